"""Whisper's audio encoder (arXiv 2212.04356): two convolutions over log-mel frames, then a pre-norm transformer.

`ConvStem`, `WhisperLayer` and the tables of their names also serve encoders that are made of the same parts.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from mllm_jax.checkpoints.architectures import kind_of
from mllm_jax.checkpoints.config_json import ELSEWHERE, Fields, read_fields, write_fields
from mllm_jax.checkpoints.config_options import ACTIVATIONS, ConfigOptions
from mllm_jax.checkpoints.fields import make_config
from mllm_jax.checkpoints.table import OUT_OF_HEADS, Family, Table, Weight, into_heads, linear, norm
from mllm_jax.data.processing.audio import LogMel
from mllm_jax.encoders.audio_output import AudioOutput
from mllm_jax.errors import ConfigError, DataError
from mllm_jax.layers.attention import Attention
from mllm_jax.layers.compute import WithCompute
from mllm_jax.layers.linear import Linear
from mllm_jax.layers.mlp import MLP
from mllm_jax.layers.norms import LayerNorm
from mllm_jax.layers.requirements import Requirements
from mllm_jax.layers.stack import layers_of
from mllm_jax.sharding.logical import constrain

NORM_EPS = 1e-5
FRAMES_A_SECOND = 100  # a log-mel frame each 160 samples
KERNEL, STRIDE = 3, 2  # of the convolutions; the second one has the stride


@dataclass(frozen=True)
class WhisperEncoderConfig(WithCompute):
    """Sizes of a Whisper encoder; the defaults are Whisper tiny's.

    Attributes:
        max_source_positions: number of output vectors; the features have twice as many frames.
    """

    num_mel_bins: int = 80
    hidden_size: int = 384
    num_layers: int = 4
    num_heads: int = 6
    mlp_size: int = 1536
    activation: str = "gelu"
    max_source_positions: int = 1500

    family = "WhisperEncoder"  # the Hugging Face architecture of the saved folder
    rate = 16_000  # samples a second of the audio from which the features are made

    def __post_init__(self):
        require = Requirements("Whisper encoder", self)
        require.one_of("activation", sorted(set(ACTIVATIONS.values())))
        require.heads()
        require_sinusoids(require, self.hidden_size)

    @property
    def feature_size(self) -> int:
        """The width of the output vectors."""
        return self.hidden_size

    def inputs(self, seconds: float) -> tuple[int, int]:
        """Returns the shape of the features of a sound, an even number of frames.

        Raises:
            ConfigError: a sound that is longer than the model's.
        """
        longest = STRIDE * self.max_source_positions / FRAMES_A_SECOND
        if seconds > longest:
            raise ConfigError(
                f"Whisper encoder: a sound of {seconds:g} seconds",
                f"at most {longest:g} seconds, which its {self.max_source_positions} positions cover",
                f"set seconds={longest:g}; a longer sound is cut into several",
            )
        return self.num_mel_bins, STRIDE * -(-round(seconds * FRAMES_A_SECOND) // STRIDE)

    def processor(self, seconds: float) -> LogMel:
        """Returns what makes the features of sounds that are padded to whole seconds.

        Raises:
            ConfigError: a part of a second.
        """
        Requirements("Whisper encoder", self)(
            seconds == round(seconds) > 0, f"sounds of {seconds:g} seconds", "whole seconds", "change seconds"
        )
        return LogMel(self.num_mel_bins, chunk_length=round(seconds), return_attention_mask=True)

    def frames(self, n: Any) -> Any:
        """Returns the number of output vectors for n mel frames, an int or an array of them."""
        return (n - 1) // STRIDE + 1

    def make(self) -> WhisperEncoder:
        return WhisperEncoder(self)


def require_sinusoids(require: Requirements, width: int) -> None:
    """Refuses a width that sines and cosines do not fill."""
    require(
        width >= 4 and width % 2 == 0,
        f"hidden_size {width}",
        "an even number from 4: one half of a position is sines, the other cosines",
        "change hidden_size",
    )


def sinusoids(length: int, width: int) -> jax.Array:
    """Returns the positions float32[length, width]: sines, then cosines, of wavelengths from 2 pi to 20,000 pi."""
    rates = jnp.exp(-np.log(10_000.0) / (width // 2 - 1) * jnp.arange(width // 2, dtype=jnp.float32))
    angles = jnp.arange(length, dtype=jnp.float32)[:, None] * rates[None]
    return jnp.concatenate([jnp.sin(angles), jnp.cos(angles)], axis=1)


# The table of positions is a parameter that is not trained.
POSITIONS = nn.with_logical_partitioning(lambda _, shape, dtype: sinusoids(*shape).astype(dtype), (None, "embed"))


def add_positions(x: jax.Array, positions: jax.Array) -> jax.Array:
    """Adds the first of the positions float32[N, E], which are not trained, to dtype[B, T, E]."""
    positions = jax.lax.stop_gradient(positions[: x.shape[1]])
    return constrain(x + positions.astype(x.dtype), "batch", "patches", None)


def require_features(config: WhisperEncoderConfig, features: jax.Array, mask: jax.Array | None) -> None:
    """Raises DataError: features or a mask of another shape than the model reads."""
    longest = STRIDE * config.max_source_positions
    frames = features.shape[2] if features.ndim == 3 else 0
    right = features.shape[1:] == (config.num_mel_bins, frames) and 0 < frames <= longest and frames % STRIDE == 0
    if not right or (mask is not None and mask.shape[1:] != (frames,)):
        raise DataError(
            f"{config.family}: features of shape {features.shape}"
            + ("" if mask is None else f" with a mask of shape {mask.shape}"),
            f"features [B, {config.num_mel_bins}, {longest}]" + ("" if mask is None else f", mask [B, {longest}]"),
            "take them from the folder's feature extractor, which pads audio to the length of the model",
        )


class ConvStem(nn.Module):
    """Two convolutions over time, the second of stride 2, each followed by GELU."""

    hidden_size: int
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, features, mask=None):
        """Maps log-mel frames to vectors.

        Args:
            features: float[B, mel, T].
            mask: [B, T], 0 at frames that the second convolution reads as zeros; None is no mask.

        Returns:
            dtype[B, (T + 1) // 2, E].
        """
        x = jnp.swapaxes(features, 1, 2).astype(self.dtype)
        how = dict(features=(self.hidden_size,), names=("channels", "embed"), use_bias=True, dtype=self.dtype)
        x = nn.gelu(Linear(**how, name="conv1")(_windows(x, 1)), approximate=False)
        if mask is not None:
            x = x * (mask != 0)[..., None].astype(self.dtype)
        return nn.gelu(Linear(**how, name="conv2")(_windows(x, STRIDE)), approximate=False)


def _windows(x: jax.Array, stride: int) -> jax.Array:
    """Returns each frame's neighbourhood of KERNEL frames, concatenated; zeros precede and follow the frames."""
    frames = x.shape[1]
    x = jnp.pad(x, ((0, 0), (KERNEL // 2, KERNEL // 2), (0, 0)))
    return jnp.concatenate([x[:, start : start + frames : stride] for start in range(KERNEL)], axis=-1)


class WhisperLayer(nn.Module):
    """Pre-norm transformer layer whose keys have no bias; `capture` also returns its output to the scan.

    Attributes:
        config: has num_heads, mlp_size, activation and dtype.
    """

    config: Any
    capture: bool = False

    @nn.compact
    def __call__(self, x, _, segments):
        """Maps dtype[B, T, E] to the same shape; segments int[B, T], of which a vector sees its own, or None."""
        c = self.config
        dtype = jnp.dtype(c.dtype)
        h = LayerNorm(NORM_EPS, dtype, name="attention_norm")(x)
        x = x + Attention(c.num_heads, k_bias=False, dtype=dtype, name="attention")(h, segments=segments)[0]
        h = LayerNorm(NORM_EPS, dtype, name="mlp_norm")(x)
        x = x + MLP(c.mlp_size, c.activation, dtype=dtype, name="mlp")(h)
        x = constrain(x, "batch", "patches", None)
        return x, x if self.capture else None


class WhisperEncoder(nn.Module):
    """Encoder of 30 seconds of speech (reference class: `WhisperEncoder`)."""

    config: WhisperEncoderConfig

    @nn.compact
    def __call__(self, features, mask=None, *, output_hidden_states: bool = False) -> AudioOutput:
        """Encodes log-mel features.

        The reference lets no vector ignore padding: silence after the audio is part of what the model was trained on.
        So a mask changes no output; it only marks the vectors of the audio itself. The positions are not trained.

        Args:
            features: float[B, mel, T] as `WhisperFeatureExtractor` returns them, T = 2 * max_source_positions; also an
                even number of fewer frames, which get the first positions: shorter sounds cost less. The reference
                refuses these.
            mask: [B, T], 1 for frames of the audio, or None.

        Returns:
            AudioOutput; its last hidden state, also as the last of the hidden states, is after the final norm.

        Raises:
            DataError: features of another shape.
        """
        c = self.config
        dtype = jnp.dtype(c.dtype)
        require_features(c, features, mask)
        positions = self.param("positions", POSITIONS, (c.max_source_positions, c.hidden_size), jnp.float32)
        x = first = add_positions(ConvStem(c.hidden_size, dtype, name="stem")(features), positions)
        x, states = layers_of(c, WhisperLayer, 1)(c, output_hidden_states, name="layers")(x, None, None)
        x = LayerNorm(NORM_EPS, dtype, name="final_norm")(x)
        states = (first, *states[:-1], x) if output_hidden_states else None
        return AudioOutput(x, None if mask is None else mask[:, ::STRIDE] != 0, states)


# ---- Hugging Face folders

ENCODER_FIELDS: Fields = {
    "num_mel_bins": ("num_mel_bins", "size", WhisperEncoderConfig.num_mel_bins),
    "hidden_size": ("d_model", "size", WhisperEncoderConfig.hidden_size),
    "num_layers": ("encoder_layers", "size", WhisperEncoderConfig.num_layers),
    "num_heads": ("encoder_attention_heads", "size", WhisperEncoderConfig.num_heads),
    "mlp_size": ("encoder_ffn_dim", "size", WhisperEncoderConfig.mlp_size),
    "activation": ("activation_function", "activation", ACTIVATIONS, "gelu"),
    "max_source_positions": ("max_source_positions", "size", WhisperEncoderConfig.max_source_positions),
}
# Options without effect here: of training, of the audio classifier, and `scale_embedding`, which the reference reads
# and does not apply.
WITHOUT_EFFECT = (
    *("encoder_layerdrop", "decoder_layerdrop", "scale_embedding", "use_weighted_layer_sum", "classifier_proj_size"),
    *("apply_spec_augment", "mask_time_prob", "mask_time_length", "mask_time_min_masks"),
    *("mask_feature_prob", "mask_feature_length", "mask_feature_min_masks"),
)
_OF_THE_DECODER = ("vocab_size", "decoder_layers", "decoder_attention_heads", "decoder_ffn_dim", "max_target_positions")


def read_encoder(options: ConfigOptions) -> WhisperEncoderConfig:
    """Reads the encoder's options of a Whisper config.json, and passes over those without effect on any part."""
    config = make_config(WhisperEncoderConfig, **read_fields(options, ENCODER_FIELDS))
    options.only("num_hidden_layers", config.num_layers)  # another name for the same number
    options.skip(*WITHOUT_EFFECT)
    return config


def from_hf_config(values: dict) -> WhisperEncoderConfig:
    """Reads config.json of `WhisperEncoder`, which also holds the options of a decoder.

    Raises:
        ConfigError: an unsupported option.
    """
    options = ConfigOptions(values, "config.json of WhisperEncoder")
    config = read_encoder(options)
    for name in _OF_THE_DECODER:
        options.size(name, 1)
    options.skip("median_filter_width", *ELSEWHERE)
    options.done()
    return config


def to_hf_config(config: WhisperEncoderConfig) -> dict:
    """Returns config.json of `WhisperEncoder`."""
    return kind_of(config.family) | write_fields(config, ENCODER_FIELDS)


def stem_weights(path: str = "stem") -> list[Weight]:
    """Returns the weights of a `ConvStem`."""
    kernel = "o i k -> (k i) o", {"k": KERNEL}
    return linear("conv1", f"{path}/conv1", *kernel) + linear("conv2", f"{path}/conv2", *kernel)


def layer_weights(hidden_size: int, num_heads: int) -> list[Weight]:
    """Returns the weights of `WhisperLayer`s, also those that a decoder's layers have in common with them."""
    head = hidden_size // num_heads
    names = [f"layers.{{layer}}.self_attn.{part}_proj" for part in "qkv"]
    return [
        *norm("layers.{layer}.self_attn_layer_norm", "layers/attention_norm"),
        *into_heads(names, "layers/attention", head, (hidden_size,) * 3, biased="qv"),
        *linear("layers.{layer}.self_attn.out_proj", "layers/attention/out", OUT_OF_HEADS, {"h": head}),
        *norm("layers.{layer}.final_layer_norm", "layers/mlp_norm"),
        *linear("layers.{layer}.fc1", "layers/mlp/up"),
        *linear("layers.{layer}.fc2", "layers/mlp/down"),
    ]


def table(config: WhisperEncoderConfig) -> Table:
    """Returns the table of `WhisperEncoder`'s weights."""
    c = config
    weights = [
        *stem_weights(),
        Weight("embed_positions.weight", "positions"),
        *layer_weights(c.hidden_size, c.num_heads),
        *norm("layer_norm", "final_norm"),
    ]
    return Table(tuple(weights))


def sample(config: WhisperEncoderConfig) -> tuple:
    """Returns arguments with which `init` creates every parameter."""
    return (jnp.zeros((1, config.num_mel_bins, STRIDE * config.max_source_positions)),)


FAMILIES = (
    Family(
        name="Whisper encoder",
        architectures=(WhisperEncoderConfig.family,),
        from_hf=from_hf_config,
        to_hf=to_hf_config,
        table=table,
        sample=sample,
    ),
)
