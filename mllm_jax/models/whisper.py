"""Whisper (arXiv 2212.04356): speech to text, as one encoder-decoder."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax.numpy as jnp
from flax import linen as nn

from mllm_jax.checkpoints.architectures import kind_of
from mllm_jax.checkpoints.config_json import Fields, read_fields, write_fields
from mllm_jax.checkpoints.config_options import ConfigOptions
from mllm_jax.checkpoints.table import Family, Table, linear, nested
from mllm_jax.encoders import whisper as encoder
from mllm_jax.encoders.audio_output import AudioOutput
from mllm_jax.encoders.whisper import ENCODER_FIELDS, WhisperEncoderConfig, layer_weights, read_encoder
from mllm_jax.errors import ConfigError
from mllm_jax.layers.compute import WithCompute, within
from mllm_jax.layers.requirements import Requirements
from mllm_jax.llms.whisper_decoder import DECODER_FIELDS, WhisperCache, WhisperDecoderConfig, decoder_table

WITH_HEAD, WITHOUT = "WhisperForConditionalGeneration", "WhisperModel"


@dataclass(frozen=True)
class WhisperConfig(WithCompute):
    """The encoder and the decoder of a Whisper.

    Attributes:
        median_filter_width: of the filter over time with which the attention to the audio is smoothed for word times.
        suppress_tokens, begin_suppress_tokens: ids that a text does not contain, and does not begin with, unless
            generation_config.json has others.
        family: the Hugging Face architecture of the saved folder.
    """

    audio: WhisperEncoderConfig = WhisperEncoderConfig()
    llm: WhisperDecoderConfig = WhisperDecoderConfig()
    median_filter_width: int = 7
    suppress_tokens: tuple[int, ...] | None = None
    begin_suppress_tokens: tuple[int, ...] | None = (220, 50256)
    family: str = WITH_HEAD

    encoder_decoder = True

    def __post_init__(self):
        require, widths = Requirements("Whisper", self), (self.audio.feature_size, self.llm.hidden_size)
        require(
            widths[0] == widths[1],
            f"an encoder of {widths[0]} dimensions and a decoder of {widths[1]}",
            "equal widths: the decoder attends to the encoder's vectors",
            "change hidden_size of one",
        )
        require.one_of("family", (WITH_HEAD, WITHOUT))

    @property
    def parts(self) -> dict[str, Any]:
        """Each part's config by the name of its parameters."""
        return {"encoder_audio": within(self.audio, self.compute), "llm": within(self.llm, self.compute)}

    def make(self) -> Whisper:
        return Whisper(self)


class Whisper(nn.Module):
    """Whisper from log-mel features and the tokens of a text to logits (reference class: see `WhisperConfig.family`).

    Training calls the module with both. Generation calls `encode` and `start` once, and then `step` with tokens.
    """

    config: WhisperConfig

    def setup(self):
        self.encoder_audio, self.llm = (part.make() for part in self.config.parts.values())

    def encode(self, features, mask=None, *, output_hidden_states: bool = False) -> AudioOutput:
        """Encodes log-mel features float[B, mel, T]; see `WhisperEncoder`."""
        return self.encoder_audio(features, mask, output_hidden_states=output_hidden_states)

    def start(self, features=None, *, encoded=None, size: int) -> WhisperCache:
        """Returns a cache from which to generate: what the decoder's layers read of the audio, and room for tokens.

        Args:
            features: float[B, mel, T], see `encode`; not read when `encoded` is given.
            encoded: dtype[B, S, E], the last hidden state of `encode`.
            size: the most tokens that the decoder will read.
        """
        return self.llm.start(self.encode(features).last_hidden_state if encoded is None else encoded, size)

    def step(
        self, tokens, cache: WhisperCache, segments=None, *, logits_at=None, heads: Sequence[tuple[int, int]] = ()
    ):
        """Reads tokens after those in the cache.

        Args:
            tokens: int[B, T], `decoder_start_token_id` first of all.
            cache: of `start`, or of the last step.
            segments: int[B, T], 0 for padding after a row's tokens, which takes no room; None is no padding.
            logits_at: int[B, M], the positions of the returned logits; None returns all.
            heads: (layer, head) pairs whose attention to the audio is returned too.

        Returns:
            (float32[B, T or M, V] logits, cache), and with heads the probabilities float32[B, heads, T, S].
        """
        return self.llm(tokens, None, segments, cache=cache, logits_at=logits_at, heads=heads)

    def __call__(
        self, features, decoder_tokens=None, decoder_positions=None, decoder_segments=None, *, project: bool = True
    ):
        """Computes the logits of the token that follows each position of a text.

        Args:
            features: float[B, mel, T], see `encode`.
            decoder_tokens: int[B, T], `decoder_start_token_id` first.
            decoder_positions: int[B, T]; None counts from 0.
            decoder_segments: int[B, T], 0 for padding; None is no padding.
            project: False stops before the head and returns HeadInputs instead of logits.

        Returns:
            float32[B, T, V].

        Raises:
            ConfigError: no decoder_tokens.
        """
        if decoder_tokens is None:
            raise ConfigError(
                "Whisper without decoder_tokens",
                "decoder_tokens int[B, T] beside the features",
                "pass the target; method='encode' gives the encoder's output alone",
            )
        source = self.encode(features).last_hidden_state
        return self.llm(decoder_tokens, decoder_positions, decoder_segments, source=source, project=project)


# ---- Hugging Face folders

_FIELDS: Fields = {
    "median_filter_width": ("median_filter_width", "size", WhisperConfig.median_filter_width),
    "suppress_tokens": ("suppress_tokens", "integers", None),
    "begin_suppress_tokens": ("begin_suppress_tokens", "integers", None),
}
# Absent ids have these defaults; null is none.
_ABSENT = write_fields(WhisperDecoderConfig(), {n: f for n, f in DECODER_FIELDS.items() if n.endswith("token_id")})
_ABSENT["begin_suppress_tokens"] = WhisperConfig.begin_suppress_tokens


def from_hf_config(family: str, values: dict) -> WhisperConfig:
    """Reads config.json of Whisper; the defaults are Whisper tiny's.

    Raises:
        ConfigError: an unsupported option.
    """
    options = ConfigOptions(_ABSENT | values, f"config.json of {family}")
    options.only("is_encoder_decoder", True)
    if family == WITHOUT:
        options.only("tie_word_embeddings", True)  # its folders have no weights of a head
    config = WhisperConfig(
        read_encoder(options),
        WhisperDecoderConfig(**read_fields(options, DECODER_FIELDS)),
        **read_fields(options, _FIELDS),
        family=family,
    )
    options.done()
    return config


def to_hf_config(config: WhisperConfig) -> dict:
    """Returns config.json of Whisper."""
    return dict(
        **kind_of(config.family),
        is_encoder_decoder=True,
        **write_fields(config, _FIELDS),
        **write_fields(config.audio, ENCODER_FIELDS) | write_fields(config.llm, DECODER_FIELDS),
    )


def table(config: WhisperConfig) -> Table:
    """Returns the table of Whisper's weights."""
    llm, whole = config.llm, config.family == WITH_HEAD
    prefix = "model." if whole else ""
    decoder = decoder_table(llm, layer_weights(llm.hidden_size, llm.num_heads))
    weights = nested(encoder.table(config.audio), f"{prefix}encoder.", "encoder_audio/")
    weights += nested(decoder, f"{prefix}decoder.", "llm/")
    if not llm.tie_word_embeddings:
        weights += tuple(linear("proj_out", "llm/lm_head", bias=False))
    spelling = (r"^(encoder|decoder)\.", r"model.\1.") if whole else (r"^model\.", "")
    return Table(weights, (spelling,), ("proj_out.weight",) if llm.tie_word_embeddings else ())


def sample(config: WhisperConfig) -> tuple:
    """Returns arguments with which `init` creates every parameter."""
    return *encoder.sample(config.audio), jnp.zeros((1, 1), jnp.int32)


FAMILIES = tuple(
    Family(
        name=name,
        architectures=(family,),
        from_hf=partial(from_hf_config, family),
        to_hf=to_hf_config,
        table=table,
        sample=sample,
    )
    for family, name in {WITH_HEAD: "Whisper", WITHOUT: "Whisper without a head"}.items()
)
