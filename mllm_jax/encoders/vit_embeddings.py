"""What leads into and out of a ViT's layers: patches to vectors, their positions, and regions of patches."""

from __future__ import annotations

from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
from einops import rearrange
from flax import linen as nn

from mllm_jax.errors import ConfigError
from mllm_jax.layers.interpolation import cubic_weights
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


def grid_positions(table: jax.Array, height: int, width: int, antialias: bool) -> jax.Array:
    """Position embeddings [side^2, E] of a square grid for another one: [height * width, E], bicubic."""
    side = round(table.shape[0] ** 0.5)
    if (height, width) == (side, side):
        return table
    rows = cubic_weights(jnp.arange(height), jnp.array(height), side, antialias)
    columns = cubic_weights(jnp.arange(width), jnp.array(width), side, antialias)
    table = rearrange(table, "(r c) e -> r c e", r=side)
    return rearrange(jnp.einsum("hr,wc,rce->hwe", rows, columns, table), "h w e -> (h w) e")


def packed_positions(table: jax.Array, places: jax.Array, grids: jax.Array, antialias: bool) -> jax.Array:
    """The same for patches whose pictures differ in size: int[B, N, 2] each -> [B, N, E]."""
    side = round(table.shape[0] ** 0.5)
    rows = cubic_weights(places[..., 0], grids[..., 0], side, antialias)
    columns = cubic_weights(places[..., 1], grids[..., 1], side, antialias)
    weights = rearrange(rows[..., :, None] * columns[..., None, :], "b n r c -> b n (r c)")
    return jnp.einsum("bns,se->bne", weights, table)


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
