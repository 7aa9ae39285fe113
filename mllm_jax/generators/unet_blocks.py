"""The blocks of a diffusion UNet: residual convolutions, transformers that read a text, and changes of resolution.

The sizes of a block are in a `UNetBlock`, which the table of tensor names reads as well; settings that all blocks share
are in a `Style`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange, repeat
from flax import linen as nn

from mllm_jax.generators.basic import Conv2D, GroupNorm
from mllm_jax.layers.attention import attention
from mllm_jax.layers.linear import Linear
from mllm_jax.layers.mlp import ACTIVATIONS as MLP_ACTIVATIONS
from mllm_jax.layers.mlp import MLP
from mllm_jax.layers.norms import LayerNorm
from mllm_jax.layers.stack import REMAT_POLICIES
from mllm_jax.sharding.logical import constrain

ACTIVATIONS = {name: MLP_ACTIVATIONS[name] for name in ("silu", "gelu", "relu")} | {"mish": jax.nn.mish}
TRANSFORMER_EPS = 1e-6  # of the group norm before a transformer; its layer norms have LAYER_EPS
LAYER_EPS = 1e-5
MASKED = -10000.0  # added to the scores of masked positions; a text of which all is masked is therefore read whole
_OUTER, _INNER = (None, None, "channels", "embed"), (None, None, "embed", "mlp")
_BACK = (None, None, "mlp", "embed")


class TextStates(NamedTuple):
    """A text condition: states [B, L, E], and mask [B, L] that is 0 at positions to be ignored, or None."""

    states: jax.Array
    mask: jax.Array | None = None


@dataclass(frozen=True)
class Style:
    """The settings that all blocks of a UNet share.

    Attributes:
        norm_groups, norm_eps: of the group norms in residual blocks.
        activation: a key of ACTIVATIONS.
        scale_shift: whether the time scales and shifts the second norm's output; else it is added before that norm.
        upcast_attention: whether the scores are products of float32 numbers.
        downsample_padding: zeros around an image that is halved; 0 means one row below and one column on the right.
        frames: rows of a batch, one after the other, that are the frames of one video.
    """

    norm_groups: int = 32
    norm_eps: float = 1e-5
    activation: str = "silu"
    scale_shift: bool = False
    upcast_attention: bool = False
    downsample_padding: int = 1
    dtype: str = "float32"
    remat: str = "none"
    frames: int = 1


@dataclass(frozen=True)
class UNetBlock:
    """The sizes of one block.

    Attributes:
        inputs: channels that enter each residual block.
        channels: channels that leave each of them.
        depths: layers of the transformers that follow each residual block; empty: there are none. A middle block has
            one residual block more than depths.
        texts: the transformers that follow a residual block one after the other: the index of the text that each reads,
            or None for self-attention in its place.
        num_heads, head_dim: of the transformers; their product may differ from `channels`.
        only_cross: whether the first attention of a transformer's layer reads the text too, without its mask.
        resample: whether the block ends with a halving of the resolution, or a doubling.
        scale: divisor of the sum of a residual block's input and output.
    """

    inputs: tuple[int, ...]
    channels: int
    depths: tuple[int, ...] = ()
    texts: tuple[int | None, ...] = (0,)
    num_heads: int = 8
    head_dim: int = 40
    only_cross: bool = False
    resample: bool = False
    scale: float = 1.0


def rematerialised(block: type[nn.Module], style: Style) -> type[nn.Module]:
    """Returns the class, whose backward pass recomputes what the style's policy does not store."""
    return block if style.remat == "none" else nn.remat(block, policy=REMAT_POLICIES[style.remat])


class ResnetBlock(nn.Module):
    """Two convolutions with group norms before them, the time between them, and a shortcut."""

    style: Style
    features: int
    scale: float = 1.0

    @nn.compact
    def __call__(self, x, time):
        """Maps dtype[B, H, W, C] and the time's embedding dtype[B, T] to dtype[B, H, W, features]."""
        s, dtype = self.style, jnp.dtype(self.style.dtype)
        act = ACTIVATIONS[s.activation]
        norm = dict(groups=s.norm_groups, eps=s.norm_eps, dtype=dtype)
        h = act(GroupNorm(**norm, name="norm_1")(x))
        h = Conv2D(self.features, names=_INNER, dtype=dtype, name="conv_1")(h)
        h = constrain(h, "batch", None, None, "mlp")
        width = self.features * (2 if s.scale_shift else 1)
        time = Linear((width,), ("embed", "mlp"), use_bias=True, dtype=dtype, name="time")(act(time))[:, None, None]
        if s.scale_shift:
            scale, shift = jnp.split(time, 2, axis=-1)
            h = GroupNorm(**norm, axis="mlp", name="norm_2")(h) * (1 + scale) + shift
        else:
            h = GroupNorm(**norm, axis="mlp", name="norm_2")(h + time)
        h = Conv2D(self.features, names=_BACK, dtype=dtype, name="conv_2")(act(h))
        if x.shape[-1] != self.features:
            x = Conv2D(self.features, 1, names=_OUTER, dtype=dtype, name="shortcut")(x)
        x = x + h
        return constrain(x if self.scale == 1 else x / self.scale, "batch", None, None, None)


class UNetAttention(nn.Module):
    """Attention without biases but at its end, to the vectors themselves or to a text."""

    num_heads: int
    head_dim: int
    upcast: bool = False
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x, text: TextStates | None = None):
        """Maps dtype[B, S, E] to dtype[B, S, E]; each row of a shorter batch of texts is read by several rows of x."""
        source = x if text is None else text.states
        into = dict(features=(self.num_heads, self.head_dim), names=("embed", "heads", "head_dim"), dtype=self.dtype)
        q = constrain(Linear(**into, name="q")(x), "batch", "patches", "heads", "head_dim")
        k, v = (Linear(**into, name=name)(source) for name in "kv")
        if len(k) < len(x):
            k, v = (repeat(each, "b ... -> (b f) ...", f=len(x) // len(k)) for each in (k, v))
        if self.upcast:
            q, k, v = (each.astype(jnp.float32) for each in (q, k, v))
        bias = None
        if text is not None and text.mask is not None:
            bias = (1 - text.mask.astype(jnp.float32)) * MASKED
            bias = repeat(bias, "b t -> b 1 s t", s=x.shape[1])
        y = attention(q, k, v, bias=bias).astype(self.dtype)
        out = dict(features=(x.shape[-1],), names=("heads", "head_dim", "embed"), in_ndim=2, use_bias=True)
        return Linear(**out, dtype=self.dtype, name="out")(y)


class TransformerLayer(nn.Module):
    """Self-attention, attention to a text and a gated MLP, with a layer norm before each."""

    style: Style
    num_heads: int
    head_dim: int
    only_cross: bool = False

    @nn.compact
    def __call__(self, x, text: TextStates | None):
        """Maps dtype[B, S, E] to dtype[B, S, E]; without a text, both attentions are self-attention."""
        dtype = jnp.dtype(self.style.dtype)
        heads = dict(num_heads=self.num_heads, head_dim=self.head_dim, upcast=self.style.upcast_attention, dtype=dtype)
        first = TextStates(text.states) if self.only_cross and text is not None else None
        h = LayerNorm(LAYER_EPS, dtype, name="norm_1")(x)
        x = x + UNetAttention(**heads, name="attention_1")(h, first)
        h = LayerNorm(LAYER_EPS, dtype, name="norm_2")(x)
        x = x + UNetAttention(**heads, name="attention_2")(h, text)
        h = LayerNorm(LAYER_EPS, dtype, name="norm_3")(x)
        x = x + MLP(4 * x.shape[-1], "gelu", gated=True, dtype=dtype, name="mlp")(h)
        return constrain(x, "batch", "patches", None)


class Transformer(nn.Module):
    """Transformer layers over the positions of an image, added to the image."""

    style: Style
    num_heads: int
    head_dim: int
    depth: int
    only_cross: bool = False

    @nn.compact
    def __call__(self, x, text: TextStates | None):
        """Maps dtype[B, H, W, C] to dtype[B, H, W, C]."""
        h = rearrange(self.normed(x), "b h w c -> b (h w) c")
        return x + rearrange(self.layers(h, text), "b (h w) c -> b h w c", h=x.shape[1])

    def normed(self, x):
        return GroupNorm(self.style.norm_groups, TRANSFORMER_EPS, jnp.dtype(self.style.dtype), name="norm")(x)

    def layers(self, h, text: TextStates | None):
        """Maps dtype[B, S, C] to dtype[B, S, C]."""
        channels = h.shape[-1]
        # A convolution of one pixel is a linear map; folders have either.
        linear = dict(names=("embed", "channels"), use_bias=True, dtype=jnp.dtype(self.style.dtype))
        h = Linear((self.num_heads * self.head_dim,), **linear, name="project_in")(h)
        for i in range(self.depth):
            layer = TransformerLayer(self.style, self.num_heads, self.head_dim, self.only_cross, name=f"layer_{i}")
            h = layer(h, text)
        return Linear((channels,), **linear | dict(names=("channels", "embed")), name="project_out")(h)


def resize_nearest(x: jax.Array, height: int, width: int) -> jax.Array:
    """Resizes images dtype[B, H, W, C] by the nearest pixel, as torch's `interpolate` rounds."""
    if all(-(-new // 2) == old for new, old in zip((height, width), x.shape[1:3], strict=True)):
        # Each pixel twice, except perhaps in the last row and column; its gradient needs no scatter.
        return repeat(x, "b h w c -> b (h r) (w s) c", r=2, s=2)[:, :height, :width]
    for axis, new in ((1, height), (2, width)):
        old = x.shape[axis]
        index = np.floor(np.arange(new, dtype=np.float32) * np.float32(old / new)).astype(int)
        x = jnp.take(x, np.minimum(index, old - 1), axis=axis)
    return x


class _Layers(nn.Module):
    """A block's residual blocks and their transformers, of which the blocks below are made."""

    style: Style
    block: UNetBlock

    def resnet(self, i: int, x, time):
        resnet = rematerialised(ResnetBlock, self.style)
        return resnet(self.style, self.block.channels, self.block.scale, name=f"resnet_{i}")(x, time)

    def transformers(self, i: int, x, texts: tuple[TextStates, ...]):
        """Applies the transformers of layer `i`, if there are some."""
        b, transformer = self.block, rematerialised(Transformer, self.style)
        for j, index in enumerate(b.texts if b.depths else ()):
            made = transformer(
                self.style, b.num_heads, b.head_dim, b.depths[i], b.only_cross,
                name=f"transformer_{i * len(b.texts) + j}",
            )  # fmt: skip
            x = made(x, None if index is None else texts[index])
        return x

    def sample(self, stride: int, padding, x):
        dtype = jnp.dtype(self.style.dtype)
        x = Conv2D(self.block.channels, 3, stride, padding, names=_OUTER, dtype=dtype, name="resample")(x)
        return constrain(x, "batch", None, None, None)


class DownBlock(_Layers):
    """Layers of one resolution, then one of half the height and width unless it is the last."""

    @nn.compact
    def __call__(self, x, time, texts: tuple[TextStates, ...]):
        """Maps dtype[B, H, W, C] to (the block's output, the images that the block of the way up reads)."""
        skips = []
        for i in range(len(self.block.inputs)):
            x = self.transformers(i, self.resnet(i, x, time), texts)
            skips.append(x)
        if self.block.resample:
            x = self.sample(2, self.style.downsample_padding or ((0, 1), (0, 1)), x)
            skips.append(x)
        return x, skips


class MidBlock(_Layers):
    """A residual block, and more after transformers."""

    @nn.compact
    def __call__(self, x, time, texts: tuple[TextStates, ...]):
        """Maps dtype[B, H, W, C] to dtype[B, H, W, C]."""
        x = self.resnet(0, x, time)
        for i in range(1, len(self.block.inputs)):
            x = self.resnet(i, self.transformers(i - 1, x, texts), time)
        return x


class UpBlock(_Layers):
    """Layers of one resolution, each of which also reads an image of the way down, then one of a larger resolution."""

    @nn.compact
    def __call__(self, x, time, texts: tuple[TextStates, ...], skips: list[jax.Array], size: tuple[int, int] | None):
        """Maps dtype[B, H, W, C] to dtype[B, *size, channels]; reads the last of `skips` first."""
        for i, skip in enumerate(reversed(skips)):
            x = self.resnet(i, jnp.concatenate([x, skip], axis=-1), time)
            x = self.transformers(i, x, texts)
        return self.sample(1, 1, resize_nearest(x, *size)) if self.block.resample else x
