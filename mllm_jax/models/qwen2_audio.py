"""Qwen2-Audio (arXiv 2407.10759): Whisper's encoder with pooling, one linear map, a Qwen LLM; any number of sounds."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from mllm_jax.checkpoints.architectures import kind_of, nameless
from mllm_jax.checkpoints.config_json import check_written, stored_fields
from mllm_jax.checkpoints.config_options import ConfigOptions
from mllm_jax.checkpoints.fields import change_fields
from mllm_jax.checkpoints.table import Family, Table, linear, nested
from mllm_jax.data.audio import as_audio, audio_length
from mllm_jax.data.image_steps import mismatch
from mllm_jax.data.message import Audio, Part
from mllm_jax.data.processing.audio import LogMel, read_audio_processor
from mllm_jax.data.processing.layouts import Layout
from mllm_jax.data.processing.media import Collated, Lazy, Media, collate_tiles
from mllm_jax.encoders import qwen2_audio
from mllm_jax.encoders.whisper import FRAMES_A_SECOND
from mllm_jax.errors import ConfigError, DataError
from mllm_jax.models.branch import Branch
from mllm_jax.models.multimodal import MultimodalConfig
from mllm_jax.models.parts import llm_table, read_llm, write_llm
from mllm_jax.projectors.mlp import MLPProjectorConfig

QWEN2_AUDIO = "Qwen2AudioForConditionalGeneration"
SOUNDS, MASKS = "audio_sounds", "audio_masks"  # in a batch
_WHAT = "a Qwen2-Audio"
# The reference's template for folders without one.
TEMPLATE = """\
{% set audio_count = namespace(value=0) %}\
{% for message in messages %}\
{% if loop.first and message['role'] != 'system' %}\
<|im_start|>system
You are a helpful assistant.<|im_end|>
{% endif %}\
<|im_start|>{{ message['role'] }}
{% if message['content'] is string %}\
{{ message['content'] }}\
{% else %}\
{% for part in message['content'] %}\
{% if part['type'] == 'audio' %}\
{% set audio_count.value = audio_count.value + 1 %}\
Audio {{ audio_count.value }}: <|audio_bos|><|AUDIO|><|audio_eos|>
{% elif 'text' in part %}\
{{ part['text'] }}\
{% endif %}\
{% endfor %}\
{% endif %}\
<|im_end|>
{% endfor %}\
{% if add_generation_prompt %}\
<|im_start|>assistant
{% endif %}"""


@dataclass(frozen=True)
class Qwen2AudioConfig(MultimodalConfig):
    """The config of Qwen2-Audio.

    Attributes:
        audio_token_id: of the token that stands for a sound and for each of its media tokens.
    """

    family: str | None = QWEN2_AUDIO
    audio_token_id: int = 151646

    reads = ("audio",)
    placeholder_fields = ("audio_token_id",)


# ---- sounds


class Qwen2AudioLayout(Layout):
    """The layout of sounds, each in pieces of at most the encoder's length, usually 30 seconds.

    A piece has one slot, and the media tokens of all pieces follow each other. The reference cuts a longer sound off.

    Args:
        config: the model's.
        processor: of sounds.

    Raises:
        ConfigError: the processor makes other features than the model reads.
    """

    needs_sizes = False
    unit = "sound"
    template = TEMPLATE

    def __init__(self, config: Qwen2AudioConfig, processor: LogMel):
        self.branch, self.audio_token = config.branch("audio"), config.audio_token_id
        self.tokens_a_slot = self.branch.tokens
        encoder = self.branch.encoder
        made = processor.feature_size, processor.chunk_samples // processor.hop_length, processor.rate
        if made != (*self.branch.inputs, encoder.rate):
            raise mismatch(
                f"a processor of sounds that makes {made[0]} x {made[1]} values from {made[2]:,} samples a second",
                f"{' x '.join(map(str, self.branch.inputs))} from {encoder.rate:,}, as the model",
            )
        self.processor = replace(processor, padding="max_length", return_attention_mask=True)

    @property
    def placeholders(self) -> dict[str, int]:
        return {"audio": self.audio_token}

    def fingerprint(self) -> str:
        return repr([self.processor, self.branch, self.audio_token])

    def prepare_all(self, rows: Sequence[Sequence[Part]]) -> list[list[Media]]:
        """Prepares sounds, which are decoded when their arrays are read: the row depends on their lengths alone.

        Raises:
            DataError: see `audio_length`; or another medium, or a sound that is too short for one media token.
        """
        return [[self._sound(part) for part in parts] for parts in rows]

    def _sound(self, part: Part) -> Media:
        if not isinstance(part, Audio):
            raise DataError(f"a {type(part).__name__}", "sounds: the model reads nothing else", "leave it out")
        processor, size = self.processor, self.processor.chunk_samples
        length = audio_length(part, processor.rate)
        starts = np.arange(0, length, size)
        steps = processor.steps(np.minimum(length - starts, size))
        counts = self.branch.length(steps)
        starts, steps, counts = (each[counts > 0] for each in (starts, steps, counts))
        if not len(counts):
            raise DataError(
                f"a sound of {length / processor.rate:.3f} s",
                f"enough for one media token of {processor.chunk_length / self.tokens_a_slot:.2f} s",
                "leave it out, or join it with others",
            )

        def read(name: str) -> np.ndarray:
            if name == MASKS:
                return (np.arange(self.branch.inputs[-1]) < steps[:, None]).astype(np.int32)
            samples = as_audio(part, processor.rate)
            return processor([samples[start : start + size] for start in starts])[processor.name]

        places = [slot * self.tokens_a_slot + np.arange(count) for slot, count in enumerate(counts)]
        ids = np.full(counts.sum(), self.audio_token)
        return Media(Lazy((SOUNDS, MASKS), read), ids, np.concatenate(places), count=len(counts), modality="audio")

    def collate(self, rows: Sequence[Sequence[Media]], slots: Mapping[str, int] | None = None) -> Collated:
        count = None if slots is None else slots.get("audio", 0)
        collated = collate_tiles(rows, self.tokens_a_slot, count, self.unit, "audio")
        if count and not collated.arrays:
            # Batches with and without sounds have the same shapes, and so one compiled program.
            collated = replace(collated, arrays=self.branch.batch_spec("audio", len(rows), count).empty())
        return collated


def layout(config: Qwen2AudioConfig, folder: Path) -> Qwen2AudioLayout:
    """Returns the layout of a model with its folder's processor settings."""
    processor = read_audio_processor(folder)
    if not isinstance(processor, LogMel):
        raise mismatch(f"{folder}: a processor of waveforms", "one of log-mel spectrograms")
    return Qwen2AudioLayout(config, processor)


# ---- Hugging Face folders


def from_hf_config(values: dict) -> Qwen2AudioConfig:
    """Reads config.json; each option is honoured or refused by name."""
    what = f"config.json of {QWEN2_AUDIO}"
    options = ConfigOptions(values, what)
    text = options.part("text_config")
    text.setdefault("model_type", "qwen2")
    llm = read_llm(text, what)
    encoder = qwen2_audio.from_hf_config(_encoder_part(options.part("audio_config", {}), what))
    token = options.id("audio_token_index", options.id("audio_token_id", Qwen2AudioConfig.audio_token_id))
    # Options of training or generation; the LLM's part has its own vocab_size and tie_word_embeddings.
    options.skip("ignore_index", "vocab_size", "tie_word_embeddings", "pad_token_id", "bos_token_id", "eos_token_id")
    options.done()
    branch = Branch(
        encoder,
        MLPProjectorConfig(llm.hidden_size, num_layers=1),
        seconds=encoder.max_source_positions * qwen2_audio.STRIDE / FRAMES_A_SECOND,
    )
    return Qwen2AudioConfig({"audio": branch}, llm, audio_token_id=token)


def _encoder_part(values: dict, what: str) -> dict:
    kind = values.get("model_type", "qwen2_audio_encoder")
    if kind != "qwen2_audio_encoder":
        raise ConfigError(f"{what}: an audio encoder {kind!r}", "qwen2_audio_encoder", "convert another checkpoint")
    return nameless(values)


def settle(config: Qwen2AudioConfig, stored: Collection[str]) -> Qwen2AudioConfig:
    """Returns the config with an output head if one is stored: transformers 5 has one, whatever config.json says."""
    if config.llm.tie_word_embeddings and any(name.endswith("lm_head.weight") for name in stored):
        return replace(config, llm=change_fields(config.llm, tie_word_embeddings=False))
    return config


def to_hf_config(config: Qwen2AudioConfig) -> dict:
    """Writes config.json; refuses options that the family does not have."""
    c = config
    if c.llm.tie_word_embeddings:
        raise ConfigError(
            f"{_WHAT} whose output head is the embedding, to be written as {c.family}",
            "a head of its own: transformers 5 would begin with a random one",
            "set llm.tie_word_embeddings=False, and llm/lm_head/kernel to the transposed embedding",
        )
    written = dict(
        **kind_of(c.family),
        audio_config=nameless(qwen2_audio.to_hf_config(c.branch("audio").encoder)),
        text_config=write_llm(c.llm, _WHAT),
        audio_token_index=c.audio_token_id,
        tie_word_embeddings=False,
    )
    return check_written(c, written, from_hf_config, _WHAT, _facts)


def _facts(c: Qwen2AudioConfig) -> dict:
    """Returns the values of the whole model that config.json must keep; the LLM checks its own."""
    branch = c.branch("audio")
    parts = dict(encoder=stored_fields(branch.encoder), projector=stored_fields(branch.projector, "hidden_size"))
    return stored_fields(c, "inputs", "llm") | parts | dict(connection=branch.connection, seconds=branch.seconds)


def table(config: Qwen2AudioConfig) -> Table:
    """Returns the table of the model's weights."""
    llm = llm_table(config.llm, _WHAT)
    weights = [
        *nested(qwen2_audio.table(config.branch("audio").encoder), "audio_tower.", "encoder_audio/"),
        *linear("multi_modal_projector.linear", "projector_audio/linear_1"),
        *nested(llm, "language_model.", "llm/"),
    ]
    spellings = (
        (r"^model\.(audio_tower|multi_modal_projector)\.", r"\1."),
        (r"^model\.language_model\.", "language_model.model."),
        (r"^lm_head\.", "language_model.lm_head."),
    )
    return Table(tuple(weights), spellings, tuple(f"language_model.{name}" for name in llm.ignored))


FAMILIES = (
    Family(
        name="Qwen2-Audio",
        architectures=(QWEN2_AUDIO,),
        from_hf=from_hf_config,
        to_hf=to_hf_config,
        table=table,
        layout=layout,
        settle=settle,
    ),
)
