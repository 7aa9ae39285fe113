"""The parts before and after a ViT's layers: patch embedding, pooling of regions, attention pooling."""

from __future__ import annotations

from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
from einops import rearrange
from flax import linen as nn

from mllm_jax.errors import ConfigError
from mllm_jax.layers.attention import attention
from mllm_jax.layers.linear import Linear
from mllm_jax.layers.mlp import MLP
from mllm_jax.layers.norms import LayerNorm

if TYPE_CHECKING:
    from mllm_jax.encoders.vit import ViTConfig


class PatchEmbedding(nn.Module):
    """Embedding of pixels as patch vectors: an optional convolutional stem, then one linear map a patch."""

    config: ViTConfig

    @nn.compact
    def __call__(self, pixels):
        """Maps dtype[B, H, W, C], or patches dtype[B, N, P*P*C] (row, column, channel), to dtype[B, N, E].

        Raises:
            ConfigError: another number of channels, or pixels that are not a whole number of patches.
        """
        c = self.config
        x = self._patches(pixels) if pixels.ndim == 4 else self._given(pixels)
        names = ("channels", "embed")
        return Linear((c.hidden_size,), names, use_bias=c.dialect.patch_bias, dtype=x.dtype, name="projection")(x)

    def _patches(self, x):
        c = self.config
        height, width, channels = x.shape[1:]
        whole = (height // c.patch_size * c.patch_size, width // c.patch_size * c.patch_size)
        if channels != c.num_channels or not all(whole) or (whole != (height, width) and not c.dialect.drop_remainder):
            raise ConfigError(
                f"ViT: pixels {height} x {width} with {channels} channels",
                f"{c.num_channels} channels, and a whole number of patches of {c.patch_size} each way",
                "resize or convert the image, or set dialect.drop_remainder to leave out the remaining pixels",
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
                "because its convolutions read neighbouring patches",
                "cut patches of that size, or pass whole images",
            )
        return x


class RegionPooling(nn.Module):
    """Linear map of the concatenated patches of each region to one vector."""

    config: ViTConfig

    @nn.compact
    def __call__(self, x):
        """Maps dtype[B, N, E] to dtype[B, regions^2, region_size]."""
        c = self.config
        side = c.image_size // c.patch_size // c.regions
        x = rearrange(x, "b (h p w q) e -> b (h w) (p q e)", h=c.regions, w=c.regions, p=side, q=side)
        init = nn.with_logical_partitioning(
            nn.initializers.lecun_normal(batch_axis=0), ("patches", "channels", "embed")
        )
        kernel = self.param("kernel", init, (*x.shape[1:], c.region_size), jnp.float32)
        return jnp.einsum("bnc,nce->bne", x, kernel.astype(x.dtype))


class AttentionPooling(nn.Module):
    """Multi-head attention pooling and an MLP after it (arXiv 2106.04560, section 3.3, as in SigLIP)."""

    num_heads: int
    mlp_size: int
    activation: str
    norm_eps: float = 1e-6
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x):
        """Maps dtype[B, N, E] to dtype[B, E]."""
        width = x.shape[-1]
        init = nn.with_logical_partitioning(nn.initializers.normal(width**-0.5), ("queries", "embed"))
        probe = self.param("probe", init, (1, width), jnp.float32).astype(self.dtype)
        heads, names = (self.num_heads, width // self.num_heads), ("embed", "heads", "head_dim")
        q = Linear(heads, names, use_bias=True, dtype=self.dtype, name="q")(probe[None])
        k = Linear(heads, names, use_bias=True, dtype=self.dtype, name="k")(x)
        v = Linear(heads, names, use_bias=True, dtype=self.dtype, name="v")(x)
        y = attention(jnp.broadcast_to(q, (x.shape[0], *q.shape[1:])), k, v)
        out = ("heads", "head_dim", "embed")
        y = Linear((width,), out, in_ndim=2, use_bias=True, dtype=self.dtype, name="out")(y)
        h = LayerNorm(self.norm_eps, self.dtype, name="norm")(y)
        return (y + MLP(self.mlp_size, self.activation, dtype=self.dtype, name="mlp")(h))[:, 0]
