"""The audio encoder of Qwen2.5-Omni (arXiv 2503.20215): Whisper's, in chunks of two seconds that see only themselves.

A chunk is `2 * n_window` log-mel frames, with positions of its own. After the layers, each two vectors are averaged and
mapped to the LLM's width. As chunks are independent, sound of any length can be encoded piece by piece.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
from einops import rearrange, reduce
from flax import linen as nn

from mllm_jax.checkpoints.architectures import kind_of
from mllm_jax.checkpoints.config_json import Fields, read_fields, write_fields
from mllm_jax.checkpoints.config_options import ConfigOptions
from mllm_jax.checkpoints.fields import make_config
from mllm_jax.checkpoints.table import Family, Table, Weight, linear, norm
from mllm_jax.encoders.audio_output import AudioOutput
from mllm_jax.encoders.whisper import (
    ENCODER_FIELDS,
    FRAMES_A_SECOND,
    NORM_EPS,
    STRIDE,
    WITHOUT_EFFECT,
    ConvStem,
    WhisperEncoderConfig,
    WhisperLayer,
    layer_weights,
    sinusoids,
    stem_weights,
)
from mllm_jax.errors import DataError
from mllm_jax.layers.linear import Linear
from mllm_jax.layers.norms import LayerNorm
from mllm_jax.layers.requirements import Requirements
from mllm_jax.layers.stack import layers_of
from mllm_jax.sharding.logical import constrain

POOL = 2  # vectors that are averaged


@dataclass(frozen=True)
class OmniAudioConfig(WhisperEncoderConfig):
    """Sizes of the audio encoder; the defaults are Qwen2.5-Omni-7B's.

    Attributes:
        n_window: half the mel frames of a chunk.
        max_source_positions: positions that the reference has; a chunk takes `n_window` of them.
        output_size: width of the output; None takes the LLM's hidden size.
    """

    num_mel_bins: int = 128
    hidden_size: int = 1280
    num_layers: int = 32
    num_heads: int = 20
    mlp_size: int = 5120
    n_window: int = 100
    output_size: int | None = None

    family = "Qwen2_5OmniAudioEncoder"  # the Hugging Face architecture of the saved folder
    projects = True  # its output has the LLM's width

    def __post_init__(self):
        super().__post_init__()
        Requirements("Qwen2.5-Omni audio encoder", self)(
            self.n_window <= self.max_source_positions,
            f"n_window {self.n_window} with max_source_positions {self.max_source_positions}",
            "a position for each vector of a chunk",
            "change n_window",
        )

    @property
    def feature_size(self) -> int | None:
        """The width of the output vectors."""
        return self.output_size

    @property
    def piece(self) -> int:
        """The fewest mel frames that can be encoded apart from those around them: whole chunks, and whole averages."""
        return STRIDE * self.n_window * (1 if self.n_window % POOL == 0 else POOL)

    def inputs(self, seconds: float) -> tuple[int, int]:
        """Returns the shape of features of that length, rounded up to whole pieces."""
        return self.num_mel_bins, max(1, -(-round(seconds * FRAMES_A_SECOND) // self.piece)) * self.piece

    def frames(self, n: Any) -> Any:
        """Returns the number of output vectors for n mel frames, an int or an array of them."""
        return super().frames(n) // POOL

    def make(self) -> OmniAudioEncoder:
        Requirements("Qwen2.5-Omni audio encoder", self).given("output_size")
        return OmniAudioEncoder(self)


class OmniAudioEncoder(nn.Module):
    """Audio encoder from log-mel frames to vectors of the LLM's width (reference class: `Qwen2_5OmniAudioEncoder`)."""

    config: OmniAudioConfig

    @nn.compact
    def __call__(self, features, mask=None, *, output_hidden_states: bool = False) -> AudioOutput:
        """Encodes log-mel features.

        Args:
            features: float[B, mel, T] of any length, as `WhisperFeatureExtractor` returns them. Values after the end of
                the audio are not read.
            mask: [B, T], 1 for frames of the audio, which come first; None: all are.

        Returns:
            AudioOutput: `last_hidden_state` [B, frames(T), output_size]; the `hidden_states` have one vector for two
            frames.

        Raises:
            DataError: features of another shape.
        """
        c = self.config
        dtype = jnp.dtype(c.dtype)
        if features.ndim != 3 or features.shape[1] != c.num_mel_bins or (mask is not None and mask.ndim != 2):
            raise DataError(
                f"Qwen2.5-Omni audio encoder: features of shape {features.shape}"
                + ("" if mask is None else f" with a mask of shape {mask.shape}"),
                f"features [B, {c.num_mel_bins}, T]" + ("" if mask is None else ", mask [B, T]"),
                "take them from the folder's feature extractor",
            )
        steps, chunk = features.shape[2], STRIDE * c.n_window
        more = -steps % chunk
        valid = None
        if mask is not None or more:
            valid = jnp.ones((features.shape[0], steps), bool) if mask is None else mask != 0
            valid = rearrange(jnp.pad(valid, ((0, 0), (0, more))), "b (k t) -> (b k) t", t=chunk)
            features = jnp.pad(features, ((0, 0), (0, 0), (0, more)))
        x = rearrange(features, "b m (k t) -> (b k) m t", t=chunk)
        x = ConvStem(c.hidden_size, dtype, name="stem")(x if valid is None else jnp.where(valid[:, None], x, 0), valid)
        x = first = constrain(x + sinusoids(c.n_window, c.hidden_size).astype(dtype), "batch", "patches", None)
        segments = None if valid is None else valid[:, ::STRIDE].astype(jnp.int32)
        x, states = layers_of(c, WhisperLayer, 1)(c, output_hidden_states, name="layers")(x, None, segments)

        def joined(x):
            """Joins the chunks of each sound, [B * K, n, ...] to [B, T', ...]."""
            return rearrange(x, "(b k) t ... -> b (k t) ...", b=features.shape[0])[:, : (steps - 1) // STRIDE + 1]

        count = c.frames(steps)
        x = reduce(joined(x)[:, : POOL * count], "b (t p) e -> b t e", "mean", p=POOL)
        x = LayerNorm(NORM_EPS, dtype, name="final_norm")(x)
        x = Linear((c.output_size,), ("channels", "embed"), use_bias=True, dtype=dtype, name="output")(x)
        # Vectors of tokens around audio, which checkpoints have and the reference does not read.
        init = nn.with_logical_partitioning(nn.initializers.normal(0.02), (None, "embed"))
        self.param("edges", init, (2, c.output_size), jnp.float32)
        if mask is not None:  # an average needs both of its vectors
            mask = joined(segments)[:, POOL - 1 : POOL * count : POOL] != 0
        return AudioOutput(x, mask, tuple(map(joined, (first, *states))) if output_hidden_states else None)


# ---- Hugging Face folders

_FIELDS: Fields = {
    name: (*option[:2], getattr(OmniAudioConfig, name)) if option[1] == "size" else option
    for name, option in ENCODER_FIELDS.items()
} | {
    "n_window": ("n_window", "size", OmniAudioConfig.n_window),
    "output_size": ("output_dim", "size", 3584),
}


def from_hf_config(values: dict) -> OmniAudioConfig:
    """Reads config.json of an audio encoder, or the `audio_config` in that of a whole model.

    Raises:
        ConfigError: an unsupported option.
    """
    options = ConfigOptions(values, f"config.json of {OmniAudioConfig.family}")
    config = make_config(OmniAudioConfig, **read_fields(options, _FIELDS))
    options.only("num_hidden_layers", config.num_layers)  # another name for the same number
    options.skip(*WITHOUT_EFFECT)
    options.done()
    return config


def to_hf_config(config: OmniAudioConfig) -> dict:
    """Returns config.json of a folder with only the encoder."""
    return kind_of(config.family) | write_fields(config, _FIELDS)


def table(config: OmniAudioConfig) -> Table:
    """Returns the table of the encoder's weights."""
    weights = [
        *stem_weights(),
        *layer_weights(config.hidden_size, config.num_heads),
        *norm("ln_post", "final_norm"),
        *linear("proj", "output"),
        Weight("audio_bos_eos_token.weight", "edges"),
    ]
    return Table(tuple(weights))


def sample(config: OmniAudioConfig) -> tuple:
    """Returns arguments with which `init` creates every parameter."""
    return (jnp.zeros((1, config.num_mel_bins, STRIDE * config.n_window)),)


FAMILIES = (
    Family(
        name="Qwen2.5-Omni audio encoder",
        architectures=(OmniAudioConfig.family,),
        from_hf=from_hf_config,
        to_hf=to_hf_config,
        table=table,
        sample=sample,
    ),
)
