"""The thinker of Qwen2.5-Omni (arXiv 2503.20215): text from images, videos and sounds, also videos with their sound."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from mllm_jax.checkpoints.architectures import architecture, kind_of, model_type, nameless
from mllm_jax.checkpoints.config_json import check_written, stored_fields
from mllm_jax.checkpoints.config_options import ConfigOptions
from mllm_jax.checkpoints.table import Family, Table, nested
from mllm_jax.data.audio import as_audio, audio_length
from mllm_jax.data.image_processors import ImageProcessor, read_image_processor
from mllm_jax.data.image_steps import mismatch
from mllm_jax.data.message import Audio, Image, Part, Video
from mllm_jax.data.processing.audio import LogMel, read_audio_processor
from mllm_jax.data.processing.media import TEXT, Collated, Lazy, PreparedMedia, Row, collate_tiles
from mllm_jax.data.processing.sounds import ARRAYS as SOUNDS
from mllm_jax.data.processing.video import sound_of
from mllm_jax.data.video import FrameSampling
from mllm_jax.data.video_settings import QWEN2 as QWEN2_FRAMES
from mllm_jax.data.video_settings import read_frames, read_sampling
from mllm_jax.encoders import omni_audio, qwen_vit
from mllm_jax.encoders.whisper import FRAMES_A_SECOND
from mllm_jax.errors import DataError
from mllm_jax.llms import qwen
from mllm_jax.models.branch import Branch
from mllm_jax.models.multimodal import MultimodalConfig
from mllm_jax.models.qwen_vl import SAMPLING, QwenVLLayout, read_mrope_llm, write_mrope_llm
from mllm_jax.models.tmrope import Timing, interleaved, tmrope_positions

THINKER = "Qwen2_5OmniThinkerForConditionalGeneration"
_TOWER = "Qwen2_5OmniVisionEncoder"
WHOLE = ("Qwen2_5OmniForConditionalGeneration", "Qwen2_5OmniModel")
_WHAT = f"config.json of {THINKER}"
# Defaults of the LLM's options that are absent from config.json.
_LLM = dict(
    vocab_size=152064, hidden_size=3584, intermediate_size=18944, num_hidden_layers=28, num_attention_heads=28,
    num_key_value_heads=4, max_position_embeddings=32768, rms_norm_eps=1e-6, rope_theta=1_000_000.0,
    sliding_window=32768,
)  # fmt: skip
_SECTIONS = (16, 24, 24)
# Options of training, of the tokenizer, or that transformers writes into every part.
_IDLE = ("ignore_index", "vision_token_id", "bos_token_id", "eos_token_id", "pad_token_id", "user_token_id")
_OF_SPEECH = ("enable_audio_output", "enable_talker", "talker_config", "token2wav_config")


@dataclass(frozen=True)
class QwenOmniConfig(MultimodalConfig):
    """The config of the thinker.

    Its branches are "image", also of videos, and "audio".

    Attributes:
        image_token_id, video_token_id, audio_token_id: of the placeholders in the text.
        vision_start_token_id, vision_end_token_id: of the tokens around an image or a video; the reference finds media
            by them.
        audio_start_token_id, audio_end_token_id: of the tokens around sound.
        position_id_per_seconds: positions of a second of video or sound.
        seconds_per_chunk: seconds of a video that come before its sound of the same seconds.
    """

    family: str | None = THINKER
    image_token_id: int = 151655
    video_token_id: int = 151656
    audio_token_id: int = 151646
    vision_start_token_id: int = 151652
    vision_end_token_id: int = 151653
    audio_start_token_id: int = 151647
    audio_end_token_id: int = 151648
    position_id_per_seconds: int = 25
    seconds_per_chunk: int = 2

    reads = ("image", "audio")

    @property
    def timing(self) -> Timing:
        """The numbers that map time to positions."""
        return Timing(self.position_id_per_seconds, self.seconds_per_chunk, self.image.encoder.merge_size)


class QwenOmniLayout(QwenVLLayout):
    """The layout of images, videos and sounds; a video may be heard too, see `Video.use_audio_in_video`.

    A sound of any length has slots of a few seconds each, which the encoder reads apart.

    Args:
        config: the model's.
        image_processor: of images.
        audio_processor: of sounds.
        frames: of the frames of a video; None: as images.
        sampling: of the frames of a video's file.

    Raises:
        ConfigError: a processor makes other inputs than the model reads.
    """

    unit = "slot"
    hears_videos = True

    def __init__(
        self,
        config: QwenOmniConfig,
        image_processor: ImageProcessor,
        audio_processor: LogMel,
        frames: ImageProcessor | None = None,
        sampling: FrameSampling = SAMPLING,
    ):
        super().__init__(config, image_processor, frames, sampling)
        self.audio_token, self.hearing = config.audio_token_id, config.branch("audio")
        made = audio_processor.feature_size, audio_processor.rate / audio_processor.hop_length
        if made != (self.hearing.inputs[0], FRAMES_A_SECOND):
            raise mismatch(
                f"a processor of sounds that makes {made[0]} values for each of {made[1]:g} frames a second",
                f"{self.hearing.inputs[0]} values, {FRAMES_A_SECOND} frames a second, as the model",
            )
        self.audio_processor = replace(audio_processor, padding="max_length", truncation=True)

    @property
    def placeholders(self) -> dict[str, int]:
        return super().placeholders | {"audio": self.audio_token}

    def fingerprint(self) -> str:
        return repr([super().fingerprint(), self.audio_processor, self.hearing, self.config.timing])

    def prepare_all(self, rows: Sequence[Sequence[Part]]) -> list[list[PreparedMedia]]:
        """Prepares the media of several texts; of a sound only its length is read before its arrays are.

        Raises:
            DataError: see `QwenVLLayout`, `audio_length` and `sound_of`; or a sound that is too short or too long.
        """
        heard = [[self._sound_of(part) for part in parts] for parts in rows]
        silent = [[_silent(part) for part in parts if not isinstance(part, Audio)] for parts in rows]
        prepared = []
        for parts, sounds, seen in zip(rows, heard, super().prepare_all(silent), strict=True):
            left, row = iter(seen), []
            for part, sound in zip(parts, sounds, strict=True):
                if sound is None:
                    row.append(next(left))
                else:
                    row += [sound] if isinstance(part, Audio) else self._together(next(left), sound)
            prepared.append(row)
        return prepared

    def _sound_of(self, part: Part) -> PreparedMedia | None:
        """Returns a sound, also that of a video; None: there is none."""
        if isinstance(part, Image):
            return None
        part = sound_of(part) if isinstance(part, Video) else part
        return None if part is None else self._sound(part)

    def _sound(self, part: Audio) -> PreparedMedia:
        processor, encoder, steps_a_slot = self.audio_processor, self.hearing.encoder, self.hearing.inputs[-1]
        length = audio_length(part, processor.rate)
        if length > processor.chunk_samples:
            raise DataError(
                f"a sound of {length / processor.rate:,.1f} seconds",
                f"at most {processor.chunk_length} seconds: the reference cuts longer ones off",
                "cut it into several, or raise chunk_length in the folder's preprocessor_config.json",
            )
        steps = processor.steps(length)
        tokens, slots = encoder.frames(steps), -(-steps // steps_a_slot)
        if not tokens:
            raise DataError(
                f"a sound of {length / processor.rate:.3f} seconds",
                "at least 0.021 seconds, three frames of log-mel values",
                "leave it out, or join it with others",
            )

        def read(name: str) -> np.ndarray:
            if name == SOUNDS[1]:
                return (np.arange(slots * steps_a_slot).reshape(slots, -1) < steps).astype(np.int32)
            features = np.pad(
                self._features(as_audio(part, processor.rate)), [(0, 0), (0, slots * steps_a_slot - steps)]
            )
            return features.reshape(len(features), slots, steps_a_slot).swapaxes(0, 1)

        ids = np.full(tokens, self.audio_token)
        return PreparedMedia(Lazy(SOUNDS, read), ids, np.arange(tokens), count=slots, modality="audio")

    def _features(self, samples: np.ndarray) -> np.ndarray:
        """Returns float32[mel, steps], the part of the processor's result for the sound itself.

        The processor pads to minutes. Here it pads until no frame reads the sound, which changes no value.
        """
        p = self.audio_processor
        more = min(2 * p.n_fft, p.chunk_samples - len(samples))
        padded = np.pad(samples, (0, more), constant_values=p.padding_value)
        return replace(p, padding="longest")([padded])[p.name][0][:, : p.steps(len(samples))]

    def _together(self, video: PreparedMedia, sound: PreparedMedia) -> list[PreparedMedia]:
        """Returns a video whose tokens include those of its sound, and the sound."""
        chunks = interleaved(video, len(sound.tokens), self.config.timing)
        both = (video, sound)
        tokens, places = (
            np.concatenate([getattr(both[kind], name)[part] for kind, part in chunks]) for name in ("tokens", "places")
        )
        owners = np.concatenate([np.full(part.stop - part.start, kind) for kind, part in chunks])
        edges = [self.config.audio_start_token_id], [self.config.audio_end_token_id]
        video = replace(
            video,
            tokens=np.concatenate([edges[0], tokens, edges[1]]),
            places=np.pad(places, 1, constant_values=TEXT),
            owners=np.pad(owners, 1),
        )
        return [video, replace(sound, tokens=sound.tokens[:0], places=sound.places[:0], inside=True)]

    def collate(self, rows: Sequence[Sequence[PreparedMedia]], slots: Mapping[str, int] | None = None) -> Collated:
        """Collates images and videos into patches, and sounds into slots."""
        seen = super().collate([[m for m in row if m.modality != "audio"] for row in rows], slots)
        heard = [[m for m in row if m.modality == "audio"] for row in rows]
        count = None if slots is None else slots.get("audio", 0)
        found = collate_tiles(heard, self.hearing.tokens, count, self.unit, "audio")
        arrays = seen.arrays | found.arrays
        if count and not found.arrays:
            # Batches with and without sounds have the same shapes, and so one compiled program.
            arrays |= self.hearing.batch_spec("audio", len(rows), count).empty()
        before = arrays["patches"].shape[1] // self.config.image.encoder.merge_unit if "patches" in arrays else 0
        first = []
        for row, images, sounds in zip(rows, seen.first, found.first, strict=True):
            kinds = iter(images), iter(before + start for start in sounds)
            first.append([next(kinds[m.modality == "audio"]) for m in row])
        return Collated(arrays, first)

    def positions(self, row: Row, media: Sequence[PreparedMedia]) -> np.ndarray:
        return tmrope_positions(row, media, self.config.timing)


def _silent(part: Part) -> Part:
    """Returns a video without its sound."""
    return replace(part, use_audio_in_video=False) if isinstance(part, Video) else part


def layout(config: QwenOmniConfig, folder: Path) -> QwenOmniLayout:
    """Returns the layout of a model with its folder's processor settings."""
    images, sounds = read_image_processor(folder), read_audio_processor(folder)
    if not isinstance(sounds, LogMel):
        raise mismatch(f"{folder}: a processor of waveforms", "one of log-mel spectrograms")
    frames = read_frames(folder, QWEN2_FRAMES, images)
    return QwenOmniLayout(config, images, sounds, frames, read_sampling(folder, SAMPLING))


# ---- Hugging Face folders

_TOKENS = ("image", "video", "audio")  # written as image_token_index
_IDS = tuple(f"{kind}_{edge}_token_id" for kind in ("vision", "audio") for edge in ("start", "end"))
_TIMES = ("position_id_per_seconds", "seconds_per_chunk")


def from_hf_config(values: dict) -> QwenOmniConfig:
    """Reads config.json of the thinker, or of the whole model, whose talker is passed over; each option of the thinker
    is honoured or refused by name."""
    if architecture(values, THINKER, *WHOLE) != THINKER:
        whole = ConfigOptions(values, "config.json of Qwen2.5-Omni")
        whole.skip(*_OF_SPEECH)
        values = whole.part("thinker_config")
        whole.done()
    options = ConfigOptions(values, _WHAT)
    text = options.part("text_config", {}) | {"tie_word_embeddings": options.flag("tie_word_embeddings", False)}
    vision = options.part("vision_config", {})
    tower = qwen_vit.from_hf_config(dict(model_type=vision.get("model_type", model_type(_TOWER)), vision_config=vision))
    audio = omni_audio.from_hf_config(nameless(options.part("audio_config", {})))
    read = {f"{kind}_token_id": _token(options, kind) for kind in _TOKENS}
    read |= {name: options.id(name, getattr(QwenOmniConfig, name)) for name in _IDS}
    read |= {name: options.size(name, getattr(QwenOmniConfig, name)) for name in _TIMES}
    options.skip(*_IDLE)
    options.done()
    return QwenOmniConfig(
        inputs={"image": Branch(tower), "audio": Branch(audio, seconds=audio.piece / FRAMES_A_SECOND)},
        llm=read_mrope_llm(text, _WHAT, "qwen2", _LLM, _SECTIONS),
        **read,
    )


def _token(options: ConfigOptions, kind: str) -> int:
    """Reads a placeholder's id in one of its two spellings."""
    usual = getattr(QwenOmniConfig, f"{kind}_token_id")
    return options.id(f"{kind}_token_index", options.id(f"{kind}_token_id", usual))


def to_hf_config(config: QwenOmniConfig) -> dict:
    """Writes config.json of the thinker; refuses options that it does not have."""
    c = config
    written = dict(
        **kind_of(c.family),
        text_config=write_mrope_llm(c.llm) | dict(model_type="qwen2_5_omni_text"),
        vision_config=nameless(qwen_vit.to_hf_config(c.image.encoder)),
        audio_config=nameless(omni_audio.to_hf_config(c.branch("audio").encoder)),
        tie_word_embeddings=c.llm.tie_word_embeddings,
        **{f"{kind}_token_index": getattr(c, f"{kind}_token_id") for kind in _TOKENS},
        **{name: getattr(c, name) for name in (*_IDS, *_TIMES)},
    )
    return check_written(c, written, from_hf_config, "a thinker of Qwen2.5-Omni", _facts)


def _facts(c: QwenOmniConfig) -> dict:
    """Returns the values that config.json must keep, also of the parts."""
    parts = {"llm": c.llm} | {modality: c.branch(modality).encoder for modality in c.inputs}
    return stored_fields(c, "inputs", "llm") | {name: stored_fields(part) for name, part in parts.items()}


def table(config: QwenOmniConfig) -> Table:
    """Returns the table of the thinker's weights, also in a folder of the whole model."""
    llm = qwen.table(config.llm)
    weights = [
        *nested(qwen_vit.table(config.image.encoder), "visual.", "encoder_image/"),
        *nested(omni_audio.table(config.branch("audio").encoder), "audio_tower.", "encoder_audio/"),
        *nested(llm, "", "llm/"),
    ]
    spellings = (
        (r"^thinker\.", ""),
        (r"^(?:talker|token2wav)\..+$", "talker"),
        (r"^model\.(visual|audio_tower)\.", r"\1."),
        (r"^model\.language_model\.", "model."),
    )
    return Table(tuple(weights), spellings, ("talker", *llm.ignored))


FAMILIES = (
    Family(
        name="Qwen2.5-Omni thinker",
        architectures=(THINKER, *WHOLE),
        from_hf=from_hf_config,
        to_hf=to_hf_config,
        table=table,
        layout=layout,
    ),
)
