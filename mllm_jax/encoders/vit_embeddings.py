"""What leads into and out of a ViT's layers: patches to vectors, and regions of patches."""

from __future__ import annotations

from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
from einops import rearrange
from flax import linen as nn

from mllm_jax.errors import ConfigError
from mllm_jax.layers.linear import Linear

if TYPE_CHECKING:
    from mllm_jax.encoders.vit import ViTConfig


class PatchEmbedding(nn.Module):
    """Pixels to patch vectors: an optional convolutional stem, then one linear map a patch."""

    config: ViTConfig

    @nn.compact
    def __call__(self, pixels):
        """dtype[B, H, W, C], or patches dtype[B, N, P*P*C] (row, column, channel) -> dtype[B, N, E]

        Raises:
            ConfigError: another number of channels, or pixels that are no whole number of patches.
        """
        c = self.config
        x = self._patches(pixels) if pixels.ndim == 4 else self._given(pixels)
        names = ("channels", "embed")
        return Linear((c.hidden_size,), names, use_bias=c.patch_bias, dtype=x.dtype, name="projection")(x)

    def _patches(self, x):
        c = self.config
        height, width, channels = x.shape[1:]
        whole = (height // c.patch_size * c.patch_size, width // c.patch_size * c.patch_size)
        if channels != c.num_channels or not all(whole) or (whole != (height, width) and not c.drop_remainder):
            raise ConfigError(
                f"ViT: pixels {height} x {width} with {channels} channels",
                f"{c.num_channels} channels, and a whole number of patches of {c.patch_size} each way",
                "resize or convert the picture, or set drop_remainder to leave out what is over",
            )
        x = x[:, : whole[0], : whole[1]]
        for i, channels in enumerate(c.stem_channels):
            init = nn.with_logical_partitioning(nn.initializers.he_normal(), (None, None, "channels", "channels"))
            kernel = self.param(f"stem_{i}_kernel", init, (3, 3, x.shape[-1], channels), jnp.float32)
            bias = self.param(
                f"stem_{i}_bias", nn.with_logical_partitioning(nn.initializers.zeros, ("channels",)), (channels,)
            )
            x = jax.lax.conv_general_dilated(
                x, kernel.astype(x.dtype), (2, 2), ((1, 1), (1, 1)), dimension_numbers=("NHWC", "HWIO", "NHWC")
            )
            x = jax.nn.relu(x + bias.astype(x.dtype))
        patch = c.patch_size // 2 ** len(c.stem_channels)
        return rearrange(x, "b (h p) (w q) c -> b (h w) (p q c)", p=patch, q=patch)

    def _given(self, x):
        c = self.config
        if c.stem_channels or x.shape[-1] != c.patch_size**2 * c.num_channels:
            raise ConfigError(
                f"ViT: packed patches of {x.shape[-1]} numbers"
                + (" for a convolutional stem" if c.stem_channels else ""),
                f"{c.patch_size}^2 * {c.num_channels} = {c.patch_size**2 * c.num_channels} numbers, and no stem, "
                "whose convolutions reach into neighbouring patches",
                "cut patches of that size, or pass whole pictures",
            )
        return x


class RegionPooling(nn.Module):
    """The patches of each region, side by side, to one vector."""

    config: ViTConfig

    @nn.compact
    def __call__(self, x):
        """dtype[B, N, E] -> dtype[B, regions^2, region_size]"""
        c = self.config
        side = c.image_size // c.patch_size // c.regions
        x = rearrange(x, "b (h p w q) e -> b (h w) (p q e)", h=c.regions, w=c.regions, p=side, q=side)
        init = nn.with_logical_partitioning(
            nn.initializers.lecun_normal(batch_axis=0), ("patches", "channels", "embed")
        )
        kernel = self.param("kernel", init, (*x.shape[1:], c.region_size), jnp.float32)
        return jnp.einsum("bnc,nce->bne", x, kernel.astype(x.dtype))
