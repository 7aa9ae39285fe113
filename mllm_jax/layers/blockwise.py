"""Attention block by block with a running softmax (arXiv 2112.05682, 2205.14135): scores are never whole in memory."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
from einops import rearrange

BLOCK = 512


def blockwise_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    *,
    mask: str = "full",
    q_segments: jax.Array | None = None,
    k_segments: jax.Array | None = None,
    q_index: jax.Array | None = None,
    window: int | jax.Array | None = None,
    scale: float | None = None,
    block: int = BLOCK,
) -> jax.Array:
    """`attention` on any platform in memory that grows with the length, not its square.

    Blocks that the causal mask hides, or that lie before every window, are not computed unless `q_index` is given. A
    query that may see nothing gets the mean of the values that it met.

    Args:
        q: [B, S, N, H].  k, v: [B, T, K, H].  The others: see `mllm_jax.layers.attention.attention`.
        block: queries, and keys, that are compared at a time.
    """
    rows, queries, keys = q.shape[0], q.shape[1], k.shape[1]
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    q_blocks, k_blocks = -(-queries // block), -(-keys // block)
    skip = mask == "causal" and q_index is None
    index = jnp.arange(queries)[None] if q_index is None else q_index
    index = jnp.broadcast_to(index, (rows, queries)) if mask == "causal" else jnp.zeros((rows, queries), jnp.int32)
    if q_segments is None:
        q_segments, k_segments = jnp.zeros((rows, queries), jnp.int32), jnp.zeros((rows, keys), jnp.int32)

    def cut(x, count):
        """[B, S, ...] -> [blocks, B, block, ...]"""
        x = jnp.pad(x, [(0, 0), (0, count * block - x.shape[1])] + [(0, 0)] * (x.ndim - 2))
        return rearrange(x, "b (c s) ... -> c b s ...", c=count)

    group = rearrange(q * scale, "b s (k g) h -> b s k g h", k=k.shape[2])
    window = jnp.int32(jnp.iinfo(jnp.int32).max) if window is None else jnp.asarray(window, jnp.int32)
    places = (cut(index, q_blocks), cut(q_segments, q_blocks), cut(k_segments, k_blocks), window)
    how = _How(block, keys, mask == "causal", skip)
    y = _attend(cut(group, q_blocks), cut(k, k_blocks), cut(v, k_blocks), places, how)
    return rearrange(y, "c b s k g h -> b (c s) (k g) h")[:, :queries].astype(q.dtype)


class _How(tuple):
    """Static facts: (block, number of keys, causal, whether hidden blocks are skipped)."""

    def __new__(cls, *facts):
        return super().__new__(cls, facts)

    def span(self, place, window, blocks: int):
        """The key blocks [first, end) that the query block at `place` may see."""
        block, _, _, skip = self
        if not skip:
            return 0, blocks
        first = jnp.maximum(place * block - window + 1, 0) // block
        return jnp.minimum(first, blocks - 1), jnp.minimum(place + 1, blocks)


def _allowed(how: _How, q_place, k_place, window, j):
    """Whether a query may see a key, and whether the key is one: bool[B, 1, 1, s, t], bool[t]."""
    block, keys, causal, _ = how
    at = j * block + jnp.arange(block)
    index, segments = q_place
    seen = segments[:, :, None] == k_place[:, None, :]
    if causal:
        distance = index[:, :, None] - at[None, None, :]
        seen &= (distance >= 0) & (distance < window)
    real = at < keys
    return (seen & real)[:, None, None], real


def _scores(q, k, seen):
    """float32[B, K, G, s, t]"""
    scores = jnp.einsum("bskgh,btkh->bkgst", q, k, preferred_element_type=jnp.float32)
    return jnp.where(seen, scores, jnp.finfo(jnp.float32).min)


@partial(jax.custom_vjp, nondiff_argnums=(4,))
def _attend(q, k, v, places, how):
    return _forward(q, k, v, places, how)[0]


def _forward(q, k, v, places, how):
    index, q_segments, k_segments, window = places

    def one(args):
        place, q, *q_place = args
        shape = (q.shape[0], *q.shape[2:4], q.shape[1])

        def body(j, carry):
            top, total, y = carry
            seen, real = _allowed(how, q_place, k_segments[j], window, j)
            scores = _scores(q, k[j], seen)
            new = jnp.maximum(top, scores.max(axis=-1))
            p = jnp.where(real, jnp.exp(scores - new[..., None]), 0)
            keep = jnp.exp(top - new)
            more = jnp.einsum("bkgst,btkh->bkgsh", p.astype(v.dtype), v[j], preferred_element_type=jnp.float32)
            return new, total * keep + p.sum(axis=-1), y * keep[..., None] + more

        least = jnp.full(shape, jnp.finfo(jnp.float32).min)
        start = least, jnp.zeros(shape), jnp.zeros((*shape, v.shape[-1]))
        top, total, y = jax.lax.fori_loop(*how.span(place, window, k.shape[0]), body, start)
        return rearrange(y / total[..., None], "b k g s h -> b s k g h").astype(q.dtype), top, total

    y, top, total = jax.lax.map(one, (jnp.arange(q.shape[0]), q, index, q_segments))
    return y, (q, k, v, places, y, top, total)


def _backward(how, kept, cotangent):
    q, k, v, places, y, top, total = kept
    index, q_segments, k_segments, window = places
    inner = (y.astype(jnp.float32) * cotangent.astype(jnp.float32)).sum(axis=-1)

    def one(carry, args):
        place, q, dy, inner, top, total, *q_place = args
        inner = rearrange(inner, "b s k g -> b k g s 1")
        dy = dy.astype(v.dtype)

        def body(j, carry):
            dq, dk, dv = carry
            seen, real = _allowed(how, q_place, k_segments[j], window, j)
            p = jnp.where(real, jnp.exp(_scores(q, k[j], seen) - top[..., None]) / total[..., None], 0)
            dp = jnp.einsum("bskgh,btkh->bkgst", dy, v[j], preferred_element_type=jnp.float32)
            ds = jnp.where(seen, p * (dp - inner), 0).astype(q.dtype)
            add = dict(preferred_element_type=jnp.float32)
            dq += jnp.einsum("bkgst,btkh->bskgh", ds, k[j], **add)
            dk = dk.at[j].add(jnp.einsum("bkgst,bskgh->btkh", ds, q, **add))
            dv = dv.at[j].add(jnp.einsum("bkgst,bskgh->btkh", p.astype(dy.dtype), dy, **add))
            return dq, dk, dv

        start = jnp.zeros(q.shape), *carry
        dq, *carry = jax.lax.fori_loop(*how.span(place, window, k.shape[0]), body, start)
        return tuple(carry), dq.astype(q.dtype)

    zeros = jnp.zeros(k.shape), jnp.zeros(v.shape)
    xs = (jnp.arange(q.shape[0]), q, cotangent, inner, top, total, index, q_segments)
    (dk, dv), dq = jax.lax.scan(one, zeros, xs)
    return dq, dk.astype(k.dtype), dv.astype(v.dtype), None


_attend.defvjp(_forward, _backward)
