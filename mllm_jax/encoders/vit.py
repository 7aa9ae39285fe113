"""Vision transformer (arXiv 2010.11929): pixels to one vector a patch."""

from __future__ import annotations

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from einops import rearrange
from flax import linen as nn
from flax import struct

from mllm_jax.errors import ConfigError
from mllm_jax.layers.attention import Attention
from mllm_jax.layers.linear import Linear
from mllm_jax.layers.mlp import MLP
from mllm_jax.layers.norms import LayerNorm
from mllm_jax.layers.stack import scan_layers
from mllm_jax.sharding.logical import constrain


@dataclass(frozen=True)
class ViTConfig:
    """Sizes of a ViT.

    Attributes:
        stem_channels: channels of 3x3 stride-2 convolutions before the patch projection (arXiv 2106.14881); each
            halves the picture, so the patch that is projected shrinks by as much. Empty: patches are cut from pixels.
        regions: None, or the side of a square grid of regions: the patches of each, side by side, become one vector of
            `region_size` by the region's own linear map. Contrastive training then teaches the places as well, and the
            LLM reads few tokens that lie in one space.
        mimetic_init: for training from scratch on little data; see `Attention`.
        image_mean, image_std: what pixels in [0, 1] are normalised with.
    """

    image_size: int = 224
    patch_size: int = 16
    hidden_size: int = 768
    num_layers: int = 12
    num_heads: int = 12
    mlp_size: int = 3072
    activation: str = "gelu"
    norm_eps: float = 1e-6
    stem_channels: tuple[int, ...] = ()
    class_token: bool = False
    regions: int | None = None
    region_size: int = 256
    mimetic_init: bool = False
    image_mean: tuple[float, float, float] = (0.5, 0.5, 0.5)
    image_std: tuple[float, float, float] = (0.5, 0.5, 0.5)
    dtype: str = "float32"
    remat: str = "none"
    scan_unroll: int = 1

    def __post_init__(self):
        if self.image_size % self.patch_size or self.patch_size % 2 ** len(self.stem_channels):
            raise ConfigError(
                f"ViT: picture {self.image_size}, patch {self.patch_size}, {len(self.stem_channels)} stem layers",
                "an image that is a whole number of patches, a patch divisible by 2^stem layers",
                "change image_size, patch_size or stem_channels",
            )
        if self.regions is not None and (
            self.regions < 1 or self.class_token or self.image_size // self.patch_size % self.regions
        ):
            raise ConfigError(
                f"ViT: {self.regions} regions on {self.image_size // self.patch_size} patches a side"
                + (" and a class token" if self.class_token else ""),
                "regions that divide the patches, and no class token",
                "change regions, image_size or patch_size",
            )

    @property
    def grid(self) -> int:
        """Vectors along one side of what comes out: regions if there are any, else patches."""
        return self.regions or self.image_size // self.patch_size

    def make(self) -> ViT:
        return ViT(self)


@struct.dataclass
class VisionOutput:
    """last_hidden_state [B, N, E]; pooler_output [B, E]: the class token if there is one, else the mean."""

    last_hidden_state: jax.Array
    pooler_output: jax.Array


class ViTBlock(nn.Module):
    """Pre-norm transformer layer, full attention."""

    config: ViTConfig

    @nn.compact
    def __call__(self, x, _):
        c = self.config
        dtype = jnp.dtype(c.dtype)
        h = LayerNorm(c.norm_eps, dtype, name="attention_norm")(x)
        x = x + Attention(c.num_heads, mimetic_init=c.mimetic_init, dtype=dtype, name="attention")(h)[0]
        h = LayerNorm(c.norm_eps, dtype, name="mlp_norm")(x)
        x = x + MLP(c.mlp_size, c.activation, dtype=dtype, name="mlp")(h)
        return constrain(x, "batch", "patches", None), None


class PatchEmbedding(nn.Module):
    """Pixels to patch vectors: an optional convolutional stem, then one linear map a patch."""

    config: ViTConfig

    @nn.compact
    def __call__(self, pixels):
        """dtype[B, H, W, 3] -> dtype[B, N, E]"""
        c = self.config
        x = pixels
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
        x = rearrange(x, "b (h p) (w q) c -> b (h w) (p q c)", p=patch, q=patch)
        return Linear((c.hidden_size,), ("channels", "embed"), use_bias=True, dtype=x.dtype, name="projection")(x)


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


class ViT(nn.Module):
    """Vision transformer with learned positions and a final LayerNorm (reference class: `ViTModel`)."""

    config: ViTConfig

    @nn.compact
    def __call__(self, pixels) -> VisionOutput:
        """Encodes normalised pixels float[B, H, W, 3]; N = grid^2 (+ 1 with a class token, which comes first)."""
        c = self.config
        dtype = jnp.dtype(c.dtype)
        x = PatchEmbedding(c, name="patch_embedding")(pixels.astype(dtype))
        normal = nn.initializers.normal(0.02)
        if c.class_token:
            init = nn.with_logical_partitioning(normal, (None, "embed"))
            token = self.param("class_token", init, (1, c.hidden_size), jnp.float32).astype(dtype)
            x = jnp.concatenate([jnp.broadcast_to(token, (x.shape[0], 1, c.hidden_size)), x], axis=1)
        init = nn.with_logical_partitioning(normal, ("patches", "embed"))
        x = x + self.param("position_embedding", init, x.shape[1:], jnp.float32).astype(dtype)
        layers = scan_layers(ViTBlock, num_layers=c.num_layers, remat=c.remat, unroll=c.scan_unroll, num_broadcast=0)
        x, _ = layers(c, name="layers")(x, None)
        x = LayerNorm(c.norm_eps, dtype, name="final_norm")(x)
        if c.regions is not None:
            x = RegionPooling(c, name="region_pooling")(x)
        return VisionOutput(x, x[:, 0] if c.class_token else x.mean(axis=1))
