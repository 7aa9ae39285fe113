"""The blocks of the autoencoder in `vae.py`: residual blocks, attention over positions, the encoder and the decoder."""

from __future__ import annotations

from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
from einops import rearrange
from flax import linen as nn

from mllm_jax.generators.basic import Conv2D, GroupNorm
from mllm_jax.layers.attention import attention
from mllm_jax.layers.linear import Linear
from mllm_jax.layers.mlp import ACTIVATIONS
from mllm_jax.layers.stack import REMAT_POLICIES
from mllm_jax.sharding.logical import constrain

if TYPE_CHECKING:
    from mllm_jax.generators.vae import AutoencoderKLConfig

NORM_EPS = 1e-6
# A downsampling convolution reads one row of zeros below the image and one column to its right.
BELOW_AND_RIGHT = ((0, 1), (0, 1))


def block_of(config: AutoencoderKLConfig, block: type[nn.Module]) -> type[nn.Module]:
    """Returns the class, rematerialised by the config's policy."""
    return block if config.remat == "none" else nn.remat(block, policy=REMAT_POLICIES[config.remat])


class Normed(nn.Module):
    """Group norm, an activation, and a 3 x 3 convolution.

    Attributes:
        activation: None means the config's.
    """

    config: AutoencoderKLConfig
    features: int
    activation: str | None = None

    @nn.compact
    def __call__(self, x):
        """Maps dtype[B, H, W, C] to dtype[B, H, W, features]."""
        c, dtype = self.config, self.config.compute_dtype
        x = GroupNorm(c.norm_groups, NORM_EPS, dtype, name="norm")(x)
        x = ACTIVATIONS[self.activation or c.activation](x)
        return Conv2D(self.features, dtype=dtype, name="conv")(x)


class Residual(nn.Module):
    """x + two `Normed` convolutions; another width of x is changed by a 1 x 1 convolution."""

    config: AutoencoderKLConfig
    features: int

    @nn.compact
    def __call__(self, x):
        """Maps dtype[B, H, W, C] to dtype[B, H, W, features]."""
        h = Normed(self.config, self.features, name="first")(x)
        h = Normed(self.config, self.features, name="second")(h)
        if x.shape[-1] != self.features:
            x = Conv2D(self.features, 1, dtype=self.config.compute_dtype, name="shortcut")(x)
        return constrain(x + h, "batch", None, None, None)


class PositionAttention(nn.Module):
    """x + attention of one head, as wide as x, over all positions of an image."""

    config: AutoencoderKLConfig

    @nn.compact
    def __call__(self, x):
        """Maps dtype[B, H, W, C] to the same shape."""
        c, dtype, width = self.config, self.config.compute_dtype, x.shape[-1]
        h = rearrange(GroupNorm(c.norm_groups, NORM_EPS, dtype, name="norm")(x), "b h w c -> b (h w) c")
        into = dict(features=(width,), names=("embed", "head_dim"), use_bias=True, dtype=dtype)
        q, k, v = (Linear(**into, name=name)(h)[:, :, None] for name in "qkv")
        h = attention(q, k, v)[:, :, 0]
        h = Linear((width,), ("head_dim", "embed"), use_bias=True, dtype=dtype, name="out")(h)
        return x + h.reshape(x.shape)


class Middle(nn.Module):
    """A residual block, attention if the config has it, and a residual block."""

    config: AutoencoderKLConfig

    @nn.compact
    def __call__(self, x):
        """Maps dtype[B, H, W, C] to the same shape."""
        c, width = self.config, x.shape[-1]
        x = block_of(c, Residual)(c, width, name="residual_0")(x)
        if c.middle_attention:
            x = block_of(c, PositionAttention)(c, name="attention")(x)
        return block_of(c, Residual)(c, width, name="residual_1")(x)


class ImageEncoder(nn.Module):
    """Images to moments; each block but the last halves height and width."""

    config: AutoencoderKLConfig

    @nn.compact
    def __call__(self, x):
        """Maps [B, H, W, C] to dtype[B, h, w, 2 * latent_channels]."""
        c, dtype = self.config, self.config.compute_dtype
        x = Conv2D(c.block_channels[0], dtype=dtype, name="conv_in")(x)
        for i, width in enumerate(c.block_channels):
            for j in range(c.layers_per_block):
                x = block_of(c, Residual)(c, width, name=f"block_{i}_residual_{j}")(x)
            if i < len(c.block_channels) - 1:
                x = Conv2D(width, stride=2, padding=BELOW_AND_RIGHT, dtype=dtype, name=f"block_{i}_down")(x)
        x = Middle(c, name="middle")(x)
        return Normed(c, 2 * c.latent_channels, "silu", name="out")(x)


class ImageDecoder(nn.Module):
    """Latents to images; each block but the last doubles height and width."""

    config: AutoencoderKLConfig

    @nn.compact
    def __call__(self, x):
        """Maps [B, h, w, latent_channels] to dtype[B, H, W, out_channels]."""
        c, dtype = self.config, self.config.compute_dtype
        x = Conv2D(c.block_channels[-1], dtype=dtype, name="conv_in")(x)
        x = Middle(c, name="middle")(x)
        for i, width in enumerate(reversed(c.block_channels)):
            for j in range(c.layers_per_block + 1):
                x = block_of(c, Residual)(c, width, name=f"block_{i}_residual_{j}")(x)
            if i < len(c.block_channels) - 1:
                x = Conv2D(width, dtype=dtype, name=f"block_{i}_up")(doubled(x))
        return Normed(c, c.out_channels, "silu", name="out")(x)


def doubled(x: jax.Array) -> jax.Array:
    """Repeats each position of [B, H, W, C] twice along height and width."""
    return jnp.repeat(jnp.repeat(x, 2, axis=1), 2, axis=2)
