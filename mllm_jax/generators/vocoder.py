"""HiFi-GAN (arXiv 2010.05646) as `SpeechT5HifiGan`, which AudioLDM-2 and SpeechT5 use: log-mel frames to sound.

Each step lengthens its input by a transposed convolution and averages residual blocks of several kernel sizes.
"""

from __future__ import annotations

import math
from collections.abc import Collection
from dataclasses import dataclass, replace

import jax
import jax.numpy as jnp
from flax import linen as nn

from mllm_jax.checkpoints.architectures import kind_of
from mllm_jax.checkpoints.config_json import Fields, check_written, read_fields, stored_fields, write_fields
from mllm_jax.checkpoints.config_options import ConfigOptions
from mllm_jax.checkpoints.table import Family, Table, Weight
from mllm_jax.errors import DataError
from mllm_jax.layers.compute import WithCompute
from mllm_jax.layers.convolution import convolve
from mllm_jax.layers.requirements import Requirements
from mllm_jax.sharding.logical import constrain

ENDS = 7  # kernel size of the first and the last convolution
LAST_SLOPE = 0.01  # of the leaky ReLU before the last convolution, whatever the config's slope is
LONGEST = 2**20  # samples a frame


@dataclass(frozen=True)
class VocoderConfig(WithCompute):
    """Sizes of a HiFi-GAN; the defaults are SpeechT5's.

    Attributes:
        num_mel_bins: width of a frame.
        hidden_size: channels before the first step; each step halves them.
        rates, kernels: lengthening and kernel size of each step's transposed convolution.
        block_kernels, block_dilations: kernel size and dilations of each residual block of a step.
        slope: of the leaky ReLUs.
        normalize: whether frames are first reduced by a stored mean and divided by a stored scale.
        rate: samples a second.
        weight_norm: whether kernels are stored as directions and lengths.
    """

    num_mel_bins: int = 80
    hidden_size: int = 512
    rates: tuple[int, ...] = (4, 4, 4, 4)
    kernels: tuple[int, ...] = (8, 8, 8, 8)
    block_kernels: tuple[int, ...] = (3, 7, 11)
    block_dilations: tuple[tuple[int, ...], ...] = ((1, 3, 5), (1, 3, 5), (1, 3, 5))
    slope: float = 0.1
    normalize: bool = True
    rate: int = 16_000
    weight_norm: bool = False

    family = "SpeechT5HifiGan"  # the Hugging Face architecture of the saved folder

    def __post_init__(self):
        require = Requirements("vocoder", self)
        steps = len(self.rates)
        require(
            steps == len(self.kernels) and all(k >= r for k, r in zip(self.kernels, self.rates, strict=True)),
            f"rates {list(self.rates)}, kernels {list(self.kernels)}",
            "a kernel for each rate, at least as long",
            "change rates or kernels",
        )
        require(
            steps >= 1 and self.hidden_size >> steps and math.prod(self.rates) <= LONGEST,
            f"{steps} steps with rates {list(self.rates)[:20]} and hidden_size {self.hidden_size}",
            f"1 step or more, a channel after each halving, and at most {LONGEST:,} samples a frame",
            "change rates or hidden_size",
        )
        require(
            len(self.block_kernels) == len(self.block_dilations) >= 1 and all(k % 2 for k in self.block_kernels),
            f"block_kernels {list(self.block_kernels)} with {len(self.block_dilations)} block_dilations",
            "odd kernel sizes, and dilations for each",
            "change block_kernels or block_dilations",
        )

    def make(self) -> Vocoder:
        return Vocoder(self)


class _Convolution(nn.Module):
    """A convolution over time.

    Attributes:
        rate: None, or the number of outputs for each input of a transposed convolution.
    """

    config: VocoderConfig
    features: int
    size: int
    dilation: int = 1
    rate: int | None = None

    @nn.compact
    def __call__(self, x):
        """Maps dtype[B, T, C] to dtype[B, T, features], or [B, rate * T, features], or one frame more."""
        dtype = jnp.dtype(self.config.dtype)
        kernel = self._kernel(x.shape[-1]).astype(dtype)
        if self.rate is None:
            around = (self.size - 1) * self.dilation // 2
            y = convolve(x, kernel, padding=((around, around),), dilation=self.dilation)
        else:
            around = self.size - 1 - (self.size - self.rate) // 2
            y = convolve(x, kernel[::-1], padding=((around, around),), spacing=self.rate)
        init = nn.with_logical_partitioning(nn.initializers.zeros, ("embed",))
        return y + self.param("bias", init, (self.features,), jnp.float32).astype(dtype)

    def _kernel(self, inputs: int) -> jax.Array:
        """Returns float32[size, inputs, features]; see `weight_norm`."""
        shape, names = (self.size, inputs, self.features), (None, "channels", "embed")
        init = nn.with_logical_partitioning(nn.initializers.lecun_normal(), names)
        if not self.config.weight_norm:
            return self.param("kernel", init, shape, jnp.float32)
        # The lengths are of the first axis that PyTorch stores: outputs, of a transposed convolution inputs.
        kept = 2 if self.rate is None else 1
        others = tuple(axis for axis in range(3) if axis != kept)
        direction = self.param("direction", init, shape, jnp.float32).astype(jnp.float32)
        length = jnp.sqrt(jnp.sum(jnp.square(direction), axis=others, keepdims=True))
        init = nn.with_logical_partitioning(lambda *_: length.reshape(-1), names[kept : kept + 1])
        wanted = self.param("length", init, (shape[kept],), jnp.float32).astype(jnp.float32)
        return direction * (wanted.reshape(length.shape) / length)


class _Block(nn.Module):
    """Residual steps of two convolutions, the first one dilated."""

    config: VocoderConfig
    size: int
    dilations: tuple[int, ...]

    @nn.compact
    def __call__(self, x):
        """Maps dtype[B, T, C] to the same shape."""
        c, width = self.config, x.shape[-1]
        for i, dilation in enumerate(self.dilations):
            h = nn.leaky_relu(x, c.slope)
            h = nn.leaky_relu(_Convolution(c, width, self.size, dilation, name=f"dilated_{i}")(h), c.slope)
            x = x + _Convolution(c, width, self.size, name=f"plain_{i}")(h)
        return x


class Vocoder(nn.Module):
    """Log-mel frames to sound (reference: `SpeechT5HifiGan`)."""

    config: VocoderConfig

    @nn.compact
    def __call__(self, mel):
        """Makes sound of frames.

        Args:
            mel: log-mel frames, float[B, T, num_mel_bins].

        Returns:
            Samples in [-1, 1], dtype[B, about T times the product of the rates].

        Raises:
            DataError: frames of another shape.
        """
        c = self.config
        if mel.ndim != 3 or mel.shape[-1] != c.num_mel_bins or mel.shape[1] < 1:
            raise DataError(
                f"vocoder: frames of shape {list(mel.shape)}",
                f"[B, frames, {c.num_mel_bins}]",
                "pass log-mel frames, one after the other along the second axis",
            )
        # Statistics of the training data, which are not trained, and stored where they are not applied too.
        shape, axis = (c.num_mel_bins,), (None,)
        mean = self.param("mean", nn.with_logical_partitioning(nn.initializers.zeros, axis), shape, jnp.float32)
        scale = self.param("scale", nn.with_logical_partitioning(nn.initializers.ones, axis), shape, jnp.float32)
        if c.normalize:
            mel = (mel - jax.lax.stop_gradient(mean)) / jax.lax.stop_gradient(scale)
        x = _Convolution(c, c.hidden_size, ENDS, name="first")(mel.astype(jnp.dtype(c.dtype)))
        for i, (rate, size) in enumerate(zip(c.rates, c.kernels, strict=True)):
            width = c.hidden_size >> (i + 1)
            x = nn.leaky_relu(x, c.slope)
            x = constrain(_Convolution(c, width, size, rate=rate, name=f"longer_{i}")(x), "batch", None, None)
            blocks = zip(c.block_kernels, c.block_dilations, strict=True)
            x = sum(_Block(c, *block, name=f"block_{i}_{j}")(x) for j, block in enumerate(blocks))
            x = x / len(c.block_kernels)
        x = _Convolution(c, 1, ENDS, name="last")(nn.leaky_relu(x, LAST_SLOPE))
        return jnp.tanh(x)[..., 0]


# ---- Hugging Face folders

_MOST = 4096  # of a rate, a kernel size and a dilation
_DEFAULTS = VocoderConfig()
_FIELDS: Fields = {
    "num_mel_bins": ("model_in_dim", "size", _DEFAULTS.num_mel_bins),
    "hidden_size": ("upsample_initial_channel", "size", _DEFAULTS.hidden_size),
    "rates": ("upsample_rates", "sizes", _DEFAULTS.rates, _MOST),
    "kernels": ("upsample_kernel_sizes", "sizes", _DEFAULTS.kernels, _MOST),
    "block_kernels": ("resblock_kernel_sizes", "sizes", _DEFAULTS.block_kernels, _MOST),
    "block_dilations": ("resblock_dilation_sizes", "several_sizes", _DEFAULTS.block_dilations, _MOST),
    "slope": ("leaky_relu_slope", "number", _DEFAULTS.slope),
    "normalize": ("normalize_before", "flag", _DEFAULTS.normalize),
    "rate": ("sampling_rate", "size", _DEFAULTS.rate),
}
# The weight norm is stored with new or old names.
_LENGTH, _DIRECTION = "parametrizations.weight.original0", "parametrizations.weight.original1"
_OLD_NORM = ((r"\.weight_g$", f".{_LENGTH}"), (r"\.weight_v$", f".{_DIRECTION}"))


def from_hf_config(values: dict) -> VocoderConfig:
    """Reads config.json of `SpeechT5HifiGan`.

    Raises:
        ConfigError: an unsupported option.
    """
    options = ConfigOptions(values, f"config.json of {VocoderConfig.family}")
    config = VocoderConfig(**read_fields(options, _FIELDS))
    options.done()
    return config


def to_hf_config(config: VocoderConfig) -> dict:
    """Returns config.json of `SpeechT5HifiGan`, which does not say whether there is a weight norm."""
    written = kind_of(config.family) | write_fields(config, _FIELDS)
    return check_written(config, written, from_hf_config, "a vocoder", lambda c: stored_fields(c, "weight_norm"))


def settle(config: VocoderConfig, stored: Collection[str]) -> VocoderConfig:
    """Returns the config with a weight norm if its tensors are stored."""
    return replace(config, weight_norm=any(name.endswith((".weight_g", f".{_LENGTH}")) for name in stored))


def table(config: VocoderConfig) -> Table:
    """Returns the table of the weights, with or without a weight norm."""
    c = config

    def convolution(name: str, path: str, pattern: str = "o i k -> k i o", lengths: str = "o 1 1 -> o") -> list[Weight]:
        bias = Weight(f"{name}.bias", f"{path}/bias")
        if not c.weight_norm:
            return [Weight(f"{name}.weight", f"{path}/kernel", pattern), bias]
        length = Weight(f"{name}.{_LENGTH}", f"{path}/length", lengths)
        return [length, Weight(f"{name}.{_DIRECTION}", f"{path}/direction", pattern), bias]

    weights = [Weight("mean", "mean"), Weight("scale", "scale"), *convolution("conv_pre", "first")]
    for i in range(len(c.rates)):
        weights += convolution(f"upsampler.{i}", f"longer_{i}", "i o k -> k i o", "i 1 1 -> i")
        for j, dilations in enumerate(c.block_dilations):
            name, path = f"resblocks.{i * len(c.block_kernels) + j}", f"block_{i}_{j}"
            for n in range(len(dilations)):
                weights += convolution(f"{name}.convs1.{n}", f"{path}/dilated_{n}")
                weights += convolution(f"{name}.convs2.{n}", f"{path}/plain_{n}")
    return Table((*weights, *convolution("conv_post", "last")), _OLD_NORM)


def sample(config: VocoderConfig) -> tuple:
    """Returns arguments with which `init` creates every parameter: one frame."""
    return (jnp.zeros((1, 1, config.num_mel_bins)),)


FAMILIES = (
    Family(
        name="HiFi-GAN vocoder",
        architectures=(VocoderConfig.family,),
        from_hf=from_hf_config,
        to_hf=to_hf_config,
        table=table,
        sample=sample,
        settle=settle,
    ),
)
