"""The transformer of Stable Diffusion 3 and 3.5 (MMDiT, arXiv 2403.03206), diffusers' `SD3Transformer2DModel`.

It predicts noise - sample in noised latents, from the time, the states of a text, and a vector of that text. Patches
and text have weights of their own and attend to both. sd3_hub.py reads and writes its folders.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
from einops import rearrange, repeat
from flax import linen as nn

from mllm_jax.errors import ConfigError
from mllm_jax.generators.unet import checked_latents, checked_texts
from mllm_jax.generators.unet_blocks import TextStates
from mllm_jax.generators.unet_time import TimeEmbedding, embed_time
from mllm_jax.layers.attention import Attention, attention
from mllm_jax.layers.compute import WithCompute
from mllm_jax.layers.linear import Linear
from mllm_jax.layers.mlp import MLP
from mllm_jax.layers.norms import LayerNorm, RMSNorm
from mllm_jax.layers.requirements import Requirements
from mllm_jax.layers.sincos import sincos_positions
from mllm_jax.layers.stack import scan_layers
from mllm_jax.sharding.logical import constrain

FAMILY = "SD3Transformer2DModel"
WHAT = "Stable Diffusion 3"  # in messages
EPS = 1e-6  # of all norms
TIME_WIDTH = 256  # of the sines and cosines of a time
MLP_RATIO = 4


class Run(NamedTuple):
    """Consecutive blocks of one kind.

    Attributes:
        start: index of the first.
        count: number of blocks.
        dual: whether the patches have a second attention, to themselves.
        last: whether it is the last block, after which the text is not read again.
    """

    start: int
    count: int
    dual: bool
    last: bool

    @property
    def path(self) -> str:
        """The name of their parameters, which are stacked."""
        return f"blocks_{self.start}"


@dataclass(frozen=True)
class SD3TransformerConfig(WithCompute):
    """Sizes of Stable Diffusion 3's transformer; the defaults are those of its medium version.

    Attributes:
        sample_size: height and width of the latents that it was trained on. It takes others, of whole patches; the
            distance of a fresh table's positions is such that this size has 0, 1, 2, ...
        patch_size: side of a patch of latents.
        num_heads, head_dim: of all attentions; their product is the hidden size.
        text_size: width of the states of the text.
        pooled_size: width of the vector of the text.
        max_patches: height and width of the table of positions, and so the most patches along a side. The positions of
            smaller latents are in its middle.
        dual_layers: indices of the blocks in which the patches have a second attention, to themselves; others than
            those of blocks have no effect.
        qk_norm: whether each head's queries and keys have an RMSNorm.
    """

    sample_size: int = 128
    patch_size: int = 2
    in_channels: int = 16
    out_channels: int = 16
    num_layers: int = 24
    num_heads: int = 24
    head_dim: int = 64
    text_size: int = 4096
    pooled_size: int = 2048
    max_patches: int = 192
    dual_layers: tuple[int, ...] = ()
    qk_norm: bool = False

    family = FAMILY
    axes = ("batch", "height", "width")  # of latents, before their channels

    def __post_init__(self):
        require = Requirements(WHAT, self)
        require(
            self.hidden_size > 0 and self.hidden_size % 4 == 0,
            f"{self.num_heads} heads (num_attention_heads) of width {self.head_dim} (attention_head_dim)",
            "a product that is a multiple of 4: positions are sines and cosines of two coordinates",
            "change num_heads or head_dim",
        )
        require(self.num_layers > 0, f"num_layers {self.num_layers}", "at least one block", "change num_layers")
        require(
            0 < self.patch_size <= self.sample_size,
            f"sample_size {self.sample_size} with patch_size {self.patch_size}",
            "at least one patch",
            "change sample_size",
        )

    @property
    def hidden_size(self) -> int:
        """The width of patches and of the text inside."""
        return self.num_heads * self.head_dim

    @property
    def text_widths(self) -> tuple[int, ...]:
        """The width of each text of a call."""
        return (self.text_size,)

    @property
    def runs(self) -> tuple[Run, ...]:
        """The blocks; those of one kind, one after the other, are scanned as one. The last is alone."""
        runs: list[Run] = []
        for i in range(self.num_layers):
            dual, last = i in self.dual_layers, i == self.num_layers - 1
            if runs and (runs[-1].dual, runs[-1].last) == (dual, last):
                runs[-1] = runs[-1]._replace(count=runs[-1].count + 1)
            else:
                runs.append(Run(i, 1, dual, last))
        return tuple(runs)

    def nearest(self, side: int) -> int:
        """Returns the height or width of latents that fits and is nearest to `side`."""
        return self.patch_size * min(max(round(side / self.patch_size), 1), self.max_patches)

    def make(self) -> SD3Transformer:
        return SD3Transformer(self)


class Stream(nn.Module):
    """The maps of one stream, patches or text: to queries, keys and values, and from the heads' results.

    Attributes:
        unread: whether its results are not read, so that there is no map of them.
    """

    config: SD3TransformerConfig
    unread: bool = False

    def setup(self):
        c, dtype = self.config, jnp.dtype(self.config.dtype)
        into = dict(features=(c.num_heads, c.head_dim), use_bias=True, dtype=dtype)
        self.q = Linear(names=("embed", "heads", "head_dim"), **into)
        self.k, self.v = (Linear(names=("embed", "kv_heads", "head_dim"), **into) for _ in "kv")
        if c.qk_norm:
            self.q_norm, self.k_norm = (RMSNorm(EPS, dtype, axis="head_dim") for _ in "qk")
        if not self.unread:
            names = ("heads", "head_dim", "embed")
            self.out = Linear((c.hidden_size,), names, in_ndim=2, use_bias=True, dtype=dtype)

    def heads(self, x) -> tuple[jax.Array, ...]:
        """Returns queries, keys and values, dtype[B, S, N, H]."""
        q, k, v = self.q(x), self.k(x), self.v(x)
        if self.config.qk_norm:
            q, k = self.q_norm(q), self.k_norm(k)
        return tuple(constrain(each, "batch", "patches", "heads", "head_dim") for each in (q, k, v))


class JointAttention(nn.Module):
    """Attention of patches and text to both.

    Attributes:
        last: whether the text's result is not read. Its queries then have weights without effect, as in folders.
    """

    config: SD3TransformerConfig
    last: bool

    @nn.compact
    def __call__(self, x, text):
        """Maps patches dtype[B, S, E] and a text dtype[B, T, E] to the same shapes; the last block's text to None."""
        image, words = Stream(self.config, name="patches"), Stream(self.config, self.last, name="text")
        (q, k, v), (text_q, text_k, text_v) = image.heads(x), words.heads(text)
        queries = q if self.last else jnp.concatenate([q, text_q], axis=1)
        k, v = jnp.concatenate([k, text_k], axis=1), jnp.concatenate([v, text_v], axis=1)
        y = constrain(attention(queries, k, v), "batch", "patches", "heads", "head_dim")
        return image.out(y[:, : x.shape[1]]), None if self.last else words.out(y[:, x.shape[1] :])


def modulation(config: SD3TransformerConfig, count: int, time, name: str) -> tuple[jax.Array, ...]:
    """Returns vectors dtype[B, 1, E] that shift, scale and gate, made of the activated time dtype[B, E].

    They start as zeros, so that fresh blocks change nothing (adaLN-Zero, arXiv 2212.09748).
    """
    how = dict(use_bias=True, kernel_init=nn.initializers.zeros, dtype=jnp.dtype(config.dtype), name=name)
    made = Linear((count, config.hidden_size), ("embed", None, "mlp"), **how)(time)
    return tuple(jnp.split(constrain(made, "batch", None, None), count, axis=1))


def _normed(x) -> jax.Array:
    return LayerNorm(EPS, x.dtype, affine=False)(x)


class JointBlock(nn.Module):
    """Joint attention and an MLP for each of the two streams, modulated by the time."""

    config: SD3TransformerConfig
    dual: bool
    last: bool

    @nn.compact
    def __call__(self, streams, _, time):
        """Maps (patches dtype[B, S, E], text dtype[B, T, E]) to the same; the last block returns its text unchanged."""
        c, dtype = self.config, jnp.dtype(self.config.dtype)
        x, text = streams
        vectors = modulation(c, 9 if self.dual else 6, time, "modulation")
        shift, scale, gate, mlp_shift, mlp_scale, mlp_gate, *second = vectors
        if self.last:  # in the order of AdaLayerNormContinuous
            text_scale, text_shift = modulation(c, 2, time, "text_modulation")
        else:
            text_vectors = modulation(c, 6, time, "text_modulation")
            text_shift, text_scale, text_gate, text_mlp_shift, text_mlp_scale, text_mlp_gate = text_vectors
        normed = _normed(x)
        found, text_found = JointAttention(c, self.last, name="attention")(
            normed * (1 + scale) + shift, _normed(text) * (1 + text_scale) + text_shift
        )
        x = x + gate * found
        if self.dual:
            shift, scale, gate = second
            heads = dict(num_heads=c.num_heads, head_dim=c.head_dim, qk_norm=c.qk_norm, norm_eps=EPS, dtype=dtype)
            x = x + gate * Attention(**heads, name="attention_2")(normed * (1 + scale) + shift)[0]
        mlp = dict(hidden_size=MLP_RATIO * c.hidden_size, activation="gelu_tanh", dtype=dtype)
        x = x + mlp_gate * MLP(**mlp, name="mlp")(_normed(x) * (1 + mlp_scale) + mlp_shift)
        if not self.last:
            text = text + text_gate * text_found
            h = _normed(text) * (1 + text_mlp_scale) + text_mlp_shift
            text = text + text_mlp_gate * MLP(**mlp, name="text_mlp")(h)
        return (constrain(x, "batch", "patches", None), constrain(text, "batch", "patches", None)), None


class SD3Transformer(nn.Module):
    """Multimodal diffusion transformer (reference: `SD3Transformer2DModel`)."""

    config: SD3TransformerConfig

    @nn.compact
    def __call__(self, latents, timesteps, text, pooled):
        """Predicts noise - sample of noised latents.

        Args:
            latents: float[B, H, W, in_channels], H and W multiples of patch_size, of at most max_patches patches.
            timesteps: int or float[B], or one number for all, from 0 to 1000.
            text: float[B, T, text_size], the states of the text encoders.
            pooled: float[B, pooled_size], the text encoders' vectors.

        Returns:
            dtype[B, H, W, out_channels]

        Raises:
            ConfigError: arrays of other shapes; names the nearest height and width that fit.
        """
        c, dtype = self.config, jnp.dtype(self.config.dtype)
        latents, timesteps = checked_latents(c, latents, timesteps, WHAT)
        (text,) = checked_texts(c, [TextStates(text)], len(latents), WHAT)
        _check_sizes(c, latents, pooled)
        linear = dict(use_bias=True, dtype=dtype)
        wide = dict(features=(c.hidden_size,), names=("channels", "embed"), **linear)
        patches = dict(p=c.patch_size, q=c.patch_size)
        x = rearrange(latents.astype(dtype), "b (h p) (w q) c -> b (h w) (p q c)", **patches)
        x = Linear(**wide, name="patches")(x) + self._positions(*latents.shape[1:3])
        time = embed_time(timesteps, TIME_WIDTH, flip_sin_to_cos=True, freq_shift=0.0)
        time = TimeEmbedding(c.hidden_size, dtype=dtype, name="time_embedding")(time)
        time = nn.silu(time + TimeEmbedding(c.hidden_size, dtype=dtype, name="pooled_embedding")(pooled))
        text = Linear(**wide, name="text")(text.states)
        streams = constrain(x, "batch", "patches", None), constrain(text, "batch", "patches", None)
        for run in c.runs:
            how = dict(num_layers=run.count, remat=c.remat, unroll=c.scan_unroll)
            blocks = scan_layers(JointBlock, **how, num_broadcast=1)
            streams, _ = blocks(c, run.dual, run.last, name=run.path)(streams, None, time)
        scale, shift = modulation(c, 2, time, "modulation_out")
        x = _normed(streams[0]) * (1 + scale) + shift
        x = Linear((c.patch_size**2 * c.out_channels,), ("embed", "channels"), **linear, name="out")(x)
        height = latents.shape[1] // c.patch_size
        return rearrange(x, "b (h w) (p q c) -> b (h p) (w q) c", h=height, **patches)

    def _positions(self, *sides: int) -> jax.Array:
        """Returns the positions dtype[1, patches, E] of latents of that height and width, which are not trained."""
        c = self.config

        def fresh(_, shape, dtype):
            step = c.sample_size // c.patch_size / c.max_patches
            return sincos_positions(c.max_patches, c.hidden_size, step).astype(dtype).reshape(shape)

        init = nn.with_logical_partitioning(fresh, (None, None, "embed"))
        table = self.param("positions", init, (c.max_patches, c.max_patches, c.hidden_size), jnp.float32)
        table = jax.lax.stop_gradient(table)
        for axis, side in enumerate(sides):
            count = side // c.patch_size
            start = (c.max_patches - count) // 2
            table = jax.lax.slice_in_dim(table, start, start + count, axis=axis)
        return repeat(table.astype(jnp.dtype(c.dtype)), "h w e -> 1 (h w) e")


def _check_sizes(c: SD3TransformerConfig, latents, pooled) -> None:
    sides = latents.shape[1:3]
    nearest = tuple(map(c.nearest, sides))
    if nearest != sides:
        raise ConfigError(
            f"{WHAT}: latents of height {sides[0]} and width {sides[1]}",
            f"multiples of {c.patch_size} up to {c.patch_size * c.max_patches}: at most pos_embed_max_size patches",
            f"take height {nearest[0]} and width {nearest[1]}, the nearest that fit",
        )
    if pooled.shape != (len(latents), c.pooled_size):
        raise ConfigError(
            f"{WHAT}: pooled of shape {list(pooled.shape)}",
            f"[{len(latents)}, {c.pooled_size}]",
            "give the vectors of the text encoders, one after the other",
        )
