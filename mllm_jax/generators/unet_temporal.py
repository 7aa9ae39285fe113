"""Layers over the frames of videos, and the blocks of images with such layers between theirs (arXiv 2308.06571).

The rows of a batch are frames: `Style.frames` of them, one after the other, are one video.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from einops import rearrange
from flax import linen as nn

from mllm_jax.generators.basic import Conv2D, GroupNorm
from mllm_jax.generators.unet_blocks import DownBlock, MidBlock, Style, Transformer, UpBlock, rematerialised
from mllm_jax.sharding.logical import constrain

CONVOLUTIONS = 4  # over time, one after the other
WINDOW = 3  # frames that each of them reads
EPS = 1e-5  # of the group norms before them
_IN, _OUT = (None, None, "embed", "mlp"), (None, None, "mlp", "embed")


class TemporalConvolutions(nn.Module):
    """Convolutions over time at each position of the images, with group norms before them, added to the images.

    The last one begins at zero, so that a model of images becomes one of videos (reference: `TemporalConvLayer`).
    """

    style: Style

    @nn.compact
    def __call__(self, x):
        """Maps the frames dtype[B F, H, W, C] to dtype[B F, H, W, C]."""
        s, dtype = self.style, jnp.dtype(self.style.dtype)
        h = rearrange(x, "(b f) h w c -> b f (h w) c", f=s.frames)
        for i in range(1, CONVOLUTIONS + 1):
            names = _IN if i % 2 else _OUT
            h = nn.silu(GroupNorm(s.norm_groups, EPS, dtype, names[-2], name=f"norm_{i}")(h))
            convolution = Conv2D(
                x.shape[-1],
                (WINDOW, 1),
                names=names,
                kernel_init=nn.initializers.zeros if i == CONVOLUTIONS else None,
                dtype=dtype,
                name=f"conv_{i}",
            )
            h = constrain(convolution(h), "batch", None, None, "mlp" if i % 2 else None)
        return x + rearrange(h, "b f (h w) c -> (b f) h w c", h=x.shape[1])


class TemporalTransformer(Transformer):
    """Transformer layers over the frames at each position of the images, added to the images.

    They read no text: both attentions of a layer are self-attention (reference: `TransformerTemporalModel`).
    """

    @nn.compact
    def __call__(self, x):
        """Maps the frames dtype[B F, H, W, C] to dtype[B F, H, W, C]."""
        height, width = x.shape[1:3]
        h = self.normed(rearrange(x, "(b f) h w c -> b f h w c", f=self.style.frames))
        h = self.layers(rearrange(h, "b f h w c -> (b h w) f c"), None)
        return x + rearrange(h, "(b h w) f c -> (b f) h w c", h=height, w=width)


class _OverFrames:
    """Puts the layers over frames into a block: after each residual block, and after each transformer."""

    def resnet(self, i: int, x: jax.Array, time: jax.Array) -> jax.Array:
        x = super().resnet(i, x, time)
        return rematerialised(TemporalConvolutions, self.style)(self.style, name=f"temporal_convolutions_{i}")(x)

    def transformers(self, i: int, x: jax.Array, texts: tuple) -> jax.Array:
        x, b = super().transformers(i, x, texts), self.block
        if not b.depths:
            return x
        transformer = rematerialised(TemporalTransformer, self.style)
        return transformer(self.style, b.num_heads, b.head_dim, 1, name=f"temporal_transformer_{i}")(x)


class VideoDownBlock(_OverFrames, DownBlock):
    """`DownBlock` with layers over frames."""


class VideoMidBlock(_OverFrames, MidBlock):
    """`MidBlock` with layers over frames."""


class VideoUpBlock(_OverFrames, UpBlock):
    """`UpBlock` with layers over frames."""
