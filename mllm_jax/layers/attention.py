"""Attention: one function for every model, and the module with its projections."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import partial

import jax
import jax.numpy as jnp
from einops import rearrange
from flax import linen as nn

from mllm_jax.layers.context_attention import blockwise_attention, context_attention, row_split, visible
from mllm_jax.layers.cudnn import cudnn_attention, cudnn_supports
from mllm_jax.layers.head_attention import head_attention
from mllm_jax.layers.linear import Linear
from mllm_jax.layers.norms import LayerNorm, RMSNorm
from mllm_jax.layers.rotary import apply_rotary
from mllm_jax.layers.splash import splash_attention, splash_supports
from mllm_jax.sharding.logical import active_mesh, constrain

MASKS = ("full", "causal")
GPUS = ("gpu", "cuda")
# With fewer queries or keys a kernel would compute mostly padding.
SHORT = 128
# From this number of queries and keys on, the scores are computed in blocks. On a CPU with a causal mask, blocks that
# fit in the cache are faster from a smaller number on: gradients take less than half the time at 512 and a quarter at
# 2,048.
LONG = 2048
CPU_LONG, CPU_BLOCK, BLOCK = 512, 128, 512


_whole_scores: ContextVar[bool] = ContextVar("whole_scores", default=False)


@contextmanager
def whole_scores() -> Iterator[None]:
    """Makes everything traced inside compute attention by its definition, to count its FLOPs or to compare."""
    token = _whole_scores.set(True)
    try:
        yield
    finally:
        _whole_scores.reset(token)


def attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    *,
    mask: str = "full",
    q_segments: jax.Array | None = None,
    k_segments: jax.Array | None = None,
    q_index: jax.Array | None = None,
    window: int | jax.Array | None = None,
    bias: jax.Array | None = None,
    scale: float | None = None,
) -> jax.Array:
    """Computes scaled dot-product attention with grouped keys, segments, a named mask and a sliding window.

    The softmax is computed in float32. A query that sees no key (padding) gets a mean of values, never NaN.

    The implementation depends on the mesh that the program is compiled for (see `use_mesh`). If the mesh splits rows
    over `context`, keys and values are passed around a ring of devices: see `context_attention`. Otherwise the platform
    decides: splash on TPU and cuDNN on GPU, if they support the arguments; on a CPU head by head without a mask; else
    blocks with a running softmax for long rows (LONG; CPU_LONG on a CPU with a causal mask); else plain XLA. Without a
    mesh, the first two are left out.

    Args:
        q: [B, S, N, H].  k, v: [B, T, K, H] with K dividing N (grouped-query attention, arXiv 2305.13245).
        mask: "full" or "causal" (a query sees keys whose index is not larger than its own).
        q_segments, k_segments: int[B, S], int[B, T]; a query sees keys of its own segment only. None: one segment.
        q_index: int[B, S] positions of the queries among the keys; None means 0..S-1. Needed with a cache.
        window: a query sees only the last `window` keys, including its own (arXiv 2004.05150); needs the causal mask.
            An int, or an int scalar that differs by layer.
        bias: float[B, N, S, T], where B and N may be 1; added to the scaled scores.
        scale: factor of the scores; None means 1/sqrt(H).

    Returns:
        [B, S, N, H] in q's dtype.
    """
    if mask not in MASKS:
        raise ValueError(f"attention mask {mask!r}; expected one of {MASKS}")
    if window is not None and mask != "causal":
        raise ValueError(f"attention mask {mask!r} with a sliding window; expected 'causal'")
    common = dict(mask=mask, q_segments=q_segments, k_segments=k_segments, window=window, scale=scale)
    split = row_split(q.shape, k.shape)
    if split is not None:
        return context_attention(split, q, k, v, q_index=q_index, bias=bias, **common)
    active = active_mesh()
    whole_rows = active is None or active[0].shape["context"] == 1
    if bias is None and whole_rows and not _whole_scores.get():
        platform = None if active is None or q_index is not None else active[0].devices.flat[0].platform
        worth_it = min(q.shape[1], k.shape[1]) >= SHORT
        if worth_it and platform == "tpu" and splash_supports(q, k, mask, window):
            return splash_attention(q, k, v, mesh=active[0], rules=active[1], **common)
        if worth_it and platform in GPUS and cudnn_supports(q, mask, window):
            return cudnn_attention(q, k, v, **common)
        cached = platform == "cpu" and mask == "causal"
        otherwise = partial(xla_attention, q_index=q_index, **common)
        if q.shape[1] * k.shape[1] >= (CPU_LONG if cached else LONG) ** 2:
            otherwise = partial(blockwise_attention, q_index=q_index, block=CPU_BLOCK if cached else BLOCK, **common)
        unmasked = mask == "full" and q_segments is None and k_segments is None and q_index is None
        if unmasked and q.shape[2] == k.shape[2] and q.shape[1] >= SHORT:
            on_cpu = partial(head_attention, scale=scale)
            if active is None:
                return jax.lax.platform_dependent(q, k, v, cpu=on_cpu, default=otherwise)
            otherwise = on_cpu if platform == "cpu" else otherwise
        return otherwise(q, k, v)
    return xla_attention(q, k, v, q_index=q_index, bias=bias, **common)


def xla_attention(
    q, k, v, *, mask="full", q_segments=None, k_segments=None, q_index=None, window=None, bias=None, scale=None
):
    """Computes `attention` by its definition, as the reference: all scores exist at once.

    A query that sees no key gets the mean of all values.
    """
    queries, keys = q.shape[1], k.shape[1]
    q = rearrange(q, "b s (k g) h -> b s k g h", k=k.shape[2]) * (q.shape[-1] ** -0.5 if scale is None else scale)
    scores = jnp.einsum("bskgh,btkh->bkgst", q, k, preferred_element_type=jnp.float32)
    if bias is not None:
        groups = (k.shape[2], -1) if bias.shape[1] > 1 else (1, 1)
        scores = scores + bias.reshape(bias.shape[0], *groups, queries, keys)
    q_index = jnp.arange(queries)[None] if q_index is None else q_index
    allowed = visible(mask == "causal", q_index, q_segments, jnp.arange(keys)[None], k_segments, window)
    if allowed is not None:
        scores = jnp.where(allowed, scores, jnp.finfo(jnp.float32).min)
    weights = jax.nn.softmax(scores, axis=-1).astype(v.dtype)
    return rearrange(jnp.einsum("bkgst,btkh->bskgh", weights, v), "b s k g h -> b s (k g) h")


def write_at(held: jax.Array, new: jax.Array, index: jax.Array) -> jax.Array:
    """Writes new [B, S, ...] into held [B, T, ...] at index int[B, S]; drops entries with an index past the end."""
    rows = jnp.arange(index.shape[0])[:, None]
    return held.at[rows, index].set(new.astype(held.dtype), mode="drop")


class Attention(nn.Module):
    """Multi-head self-attention with optional grouped keys, rotary positions and cache.

    Attributes:
        num_kv_heads: None means num_heads.
        head_dim: None means hidden size / num_heads.
        k_bias: whether keys have a bias if queries and values do; it cancels in the softmax, and EVA has none.
        qk_norm: RMSNorm on each head's queries and keys (Qwen3).
        qk_norm_width: whether that norm is over all heads together instead of each head (InternViT-6B).
        out_norm_eps: epsilon of a LayerNorm over all heads before the last map (sub-LN, arXiv 2210.06423), or None.
        rotary_interleaved: whether rotary positions rotate neighbouring dimensions together; see `apply_rotary`.
        mimetic_init: whether queries start close to the keys of similar vectors and outputs start as copies of their
            inputs, as in trained models (arXiv 2305.09828). Looking up and comparing are then learned from little data.
    """

    num_heads: int
    num_kv_heads: int | None = None
    head_dim: int | None = None
    mask: str = "full"
    qkv_bias: bool = True
    k_bias: bool = True
    out_bias: bool = True
    qk_norm: bool = False
    qk_norm_width: bool = False
    out_norm_eps: float | None = None
    rotary_interleaved: bool = False
    norm_eps: float = 1e-6
    out_init_std: float | None = None
    mimetic_init: bool = False
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x, *, segments=None, k_segments=None, angles=None, window=None, cache=None):
        """Computes self-attention over x, and over the cache if there is one.

        Args:
            x: [B, S, E].
            segments: int[B, S] or None.
            k_segments: int[B, S], the segments of the keys; None: `segments`. With a cache, its own are used.
            angles: rotary angles of the positions of x, or None.
            window: see `attention`.
            cache: None, or (keys [B, T, K, H], values [B, T, K, H], k_segments int[B, T], index int[B, S]): the keys
                and values of x are written at `index`, and queries attend to all T entries.

        Returns:
            ([B, S, E], (keys, values)): the second is the cache after writing, None without a cache.
        """
        head_dim = self.head_dim or x.shape[-1] // self.num_heads
        kv_heads = self.num_kv_heads or self.num_heads
        k_bias = self.qkv_bias and self.k_bias
        common = dict(use_bias=self.qkv_bias, dtype=self.dtype)
        inits = dict.fromkeys("qkvo")
        if self.mimetic_init and self.is_initializing():
            inits = _mimetic(self.make_rng("params"), x.shape[-1], self.num_heads, kv_heads, head_dim)
        q_names, kv_names = ("embed", "heads", "head_dim"), ("embed", "kv_heads", "head_dim")
        q = Linear((self.num_heads, head_dim), q_names, kernel_init=inits["q"], **common, name="q")(x)
        k = Linear((kv_heads, head_dim), kv_names, kernel_init=inits["k"], **common | dict(use_bias=k_bias), name="k")(
            x
        )
        v = Linear((kv_heads, head_dim), kv_names, kernel_init=inits["v"], **common, name="v")(x)
        q = constrain(q, "batch", "seq", "heads", "head_dim")
        if self.qk_norm and self.qk_norm_width:
            q = _over_heads(RMSNorm(self.norm_eps, self.dtype, axis="heads", name="q_norm"), q)
            k = _over_heads(RMSNorm(self.norm_eps, self.dtype, axis="kv_heads", name="k_norm"), k)
        elif self.qk_norm:
            q = RMSNorm(self.norm_eps, self.dtype, name="q_norm")(q)
            k = RMSNorm(self.norm_eps, self.dtype, name="k_norm")(k)
        if angles is not None:
            q, k = (apply_rotary(each, angles, self.rotary_interleaved) for each in (q, k))
        written, k_segments, index = None, segments if k_segments is None else k_segments, None
        if cache is not None:
            keys, values, k_segments, index = cache
            k, v = written = write_at(keys, k, index), write_at(values, v, index)
            k, v = k.astype(self.dtype), v.astype(self.dtype)
        y = attention(q, k, v, mask=self.mask, q_segments=segments, k_segments=k_segments, q_index=index, window=window)
        y = constrain(y, "batch", "seq", "heads", "head_dim")
        if self.out_norm_eps is not None:
            y = _over_heads(LayerNorm(self.out_norm_eps, self.dtype, axis="heads", name="norm"), y)
        y = Linear(
            (x.shape[-1],),
            ("heads", "head_dim", "embed"),
            in_ndim=2,
            use_bias=self.out_bias,
            init_std=self.out_init_std,
            kernel_init=inits["o"],
            dtype=self.dtype,
            name="out",
        )(y)
        return y, written


def _over_heads(norm: nn.Module, x: jax.Array) -> jax.Array:
    """Applies a norm over all heads of x [B, S, N, H] together."""
    return rearrange(norm(rearrange(x, "b s n h -> b s (n h)")), "b s (n h) -> b s n h", n=x.shape[2])


def _mimetic(key, width: int, num_heads: int, kv_heads: int, head_dim: int) -> dict:
    """Returns initializers of q, k, v and o with W_q W_k^T and W_v W_o close to multiples of the identity."""
    keys = jax.random.split(key, 3)
    group = num_heads // kv_heads
    k, v = (jax.random.normal(each, (width, kv_heads, head_dim)) / width**0.5 for each in keys[:2])
    noise = jax.random.normal(keys[2], (width, num_heads, head_dim)) / width**0.5
    q = 0.8 * jnp.repeat(k, group, axis=1) + 0.6 * noise
    o = 0.3 * rearrange(jnp.repeat(v, group, axis=1), "e n h -> n h e")
    return {name: (lambda *_, value=value: value) for name, value in (("q", q), ("k", k), ("v", v), ("o", o))}
