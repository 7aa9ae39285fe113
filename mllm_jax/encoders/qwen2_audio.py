"""Qwen2-Audio's audio encoder (arXiv 2407.10759): Whisper's, which ignores padding, with means of pairs of vectors."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
from einops import reduce
from flax import linen as nn

from mllm_jax.checkpoints.architectures import kind_of
from mllm_jax.checkpoints.config_json import ELSEWHERE, Fields, read_fields, write_fields
from mllm_jax.checkpoints.config_options import ConfigOptions
from mllm_jax.checkpoints.fields import make_config
from mllm_jax.checkpoints.table import Family
from mllm_jax.encoders.audio_output import AudioOutput
from mllm_jax.encoders.whisper import (
    ENCODER_FIELDS,
    NORM_EPS,
    POSITIONS,
    STRIDE,
    ConvStem,
    WhisperEncoderConfig,
    WhisperLayer,
    add_positions,
    require_features,
    sample,
    table,
)
from mllm_jax.layers.norms import LayerNorm
from mllm_jax.layers.requirements import Requirements
from mllm_jax.layers.stack import layers_of

POOL = 2  # vectors of which each output vector is the mean


@dataclass(frozen=True)
class Qwen2AudioEncoderConfig(WhisperEncoderConfig):
    """Sizes of a Qwen2-Audio encoder; the defaults are the published model's.

    Attributes:
        max_source_positions: twice the number of output vectors; the features have twice as many frames.
    """

    num_mel_bins: int = 128
    hidden_size: int = 1280
    num_layers: int = 32
    num_heads: int = 20
    mlp_size: int = 5120

    family = "Qwen2AudioEncoder"

    def __post_init__(self):
        super().__post_init__()
        Requirements("Qwen2-Audio encoder", self)(
            self.max_source_positions >= POOL,
            f"max_source_positions {self.max_source_positions}",
            f"at least {POOL}, which make one output vector",
            "change max_source_positions",
        )

    def frames(self, n: Any) -> Any:
        """Returns the number of output vectors for n mel frames, an int or an array of them."""
        return super().frames(n) // POOL

    def make(self) -> Qwen2AudioEncoder:
        return Qwen2AudioEncoder(self)


class Qwen2AudioEncoder(nn.Module):
    """Encoder of up to 30 seconds of sound (reference class: `Qwen2AudioEncoder`)."""

    config: Qwen2AudioEncoderConfig

    @nn.compact
    def __call__(self, features, mask=None, *, output_hidden_states: bool = False) -> AudioOutput:
        """Encodes log-mel features.

        Args:
            features: float[B, mel, T] as `WhisperFeatureExtractor` returns them, T = 2 * max_source_positions; also an
                even number of fewer frames, which the reference refuses.
            mask: [B, T], 1 for frames of the sound, which then attend only to each other; None: all are. The
                convolutions read the frames after the sound too, as in the reference.

        Returns:
            AudioOutput; its vectors after the end of the sound have no meaning. Hidden states are the reference's: the
            last one is the output.

        Raises:
            DataError: features of another shape.
        """
        c = self.config
        dtype = jnp.dtype(c.dtype)
        require_features(c, features, mask)
        heard = None if mask is None else mask[:, ::STRIDE] != 0
        segments = None if heard is None else heard.astype(jnp.int32)
        positions = self.param("positions", POSITIONS, (c.max_source_positions, c.hidden_size), jnp.float32)
        x = first = add_positions(ConvStem(c.hidden_size, dtype, name="stem")(features), positions)
        x, states = layers_of(c, WhisperLayer, 1)(c, output_hidden_states, name="layers")(x, None, segments)
        x = LayerNorm(NORM_EPS, dtype, name="final_norm")(_pooled(x, "mean"))
        states = (first, *states[:-1], x) if output_hidden_states else None
        return AudioOutput(x, None if heard is None else _pooled(heard, "min"), states)


def _pooled(x, how: str):
    """Reduces each pair of [B, T, ...] to one; a last one without a partner is left out."""
    return reduce(x[:, : x.shape[1] // POOL * POOL], "b (t p) ... -> b t ...", how, p=POOL)


# ---- Hugging Face folders

FIELDS: Fields = ENCODER_FIELDS | {
    field: (*ENCODER_FIELDS[field][:2], getattr(Qwen2AudioEncoderConfig, field))
    for field in ("num_mel_bins", "hidden_size", "num_layers", "num_heads", "mlp_size", "max_source_positions")
}


def from_hf_config(values: dict) -> Qwen2AudioEncoderConfig:
    """Reads config.json of `Qwen2AudioEncoder`, or `audio_config` of the whole model.

    Raises:
        ConfigError: an unsupported option.
    """
    options = ConfigOptions(values, f"config.json of {Qwen2AudioEncoderConfig.family}")
    config = make_config(Qwen2AudioEncoderConfig, **read_fields(options, FIELDS))
    options.only("num_hidden_layers", config.num_layers)  # another name for the same number
    # The reference reads scale_embedding and does not apply it; the layer drop is of training.
    options.skip("scale_embedding", "encoder_layerdrop", *ELSEWHERE)
    options.done()
    return config


def to_hf_config(config: Qwen2AudioEncoderConfig) -> dict:
    """Returns config.json of `Qwen2AudioEncoder`."""
    return kind_of(config.family) | write_fields(config, FIELDS)


FAMILIES = (
    Family(
        name="Qwen2-Audio encoder",
        architectures=(Qwen2AudioEncoderConfig.family,),
        from_hf=from_hf_config,
        to_hf=to_hf_config,
        table=table,
        sample=sample,
    ),
)
