"""Qwen2-Audio (arXiv 2407.10759): Whisper's encoder with pooling, one linear map, a Qwen LLM; any number of sounds."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, replace
from pathlib import Path

from mllm_jax.checkpoints.architectures import kind_of, nameless
from mllm_jax.checkpoints.config_json import check_written, stored_fields
from mllm_jax.checkpoints.config_options import ConfigOptions
from mllm_jax.checkpoints.fields import change_fields
from mllm_jax.checkpoints.table import Family, Table, linear, nested
from mllm_jax.data.image_steps import mismatch
from mllm_jax.data.processing.audio import LogMel, read_audio_processor
from mllm_jax.data.processing.composed import ComposedLayout
from mllm_jax.data.processing.sounds import SoundTokens
from mllm_jax.encoders import qwen2_audio
from mllm_jax.encoders.whisper import FRAMES_A_SECOND, STRIDE
from mllm_jax.errors import ConfigError
from mllm_jax.models.branch import Branch
from mllm_jax.models.multimodal import MultimodalConfig
from mllm_jax.models.parts import llm_table, read_llm, write_llm
from mllm_jax.projectors.mlp import MLPProjectorConfig

QWEN2_AUDIO = "Qwen2AudioForConditionalGeneration"
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


class Qwen2AudioLayout(ComposedLayout):
    """The layout of sounds, each in pieces of at most the encoder's length, usually 30 seconds.

    A piece has one slot, and the media tokens of all pieces follow each other. The reference cuts a longer sound off.

    Args:
        config: the model's.
        processor: of sounds.

    Raises:
        ConfigError: the processor makes other features than the model reads.
    """

    keeps_text = one_placeholder = False
    template = TEMPLATE

    def __init__(self, config: Qwen2AudioConfig, processor: LogMel):
        branch = config.branch("audio")
        made = processor.feature_size, processor.chunk_samples // processor.hop_length, processor.rate
        if made != (*branch.inputs, branch.encoder.rate):
            raise mismatch(
                f"a processor of sounds that makes {made[0]} x {made[1]} values from {made[2]:,} samples a second",
                f"{' x '.join(map(str, branch.inputs))} from {branch.encoder.rate:,}, as the model",
            )
        processor = replace(processor, padding="max_length", return_attention_mask=True)
        sounds = SoundTokens(processor, processor.chunk_samples, branch.inputs, branch.length)
        super().__init__({"audio": sounds}, config.audio_token_id)


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
        seconds=STRIDE * encoder.max_source_positions / FRAMES_A_SECOND,
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
