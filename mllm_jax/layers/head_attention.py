"""Attention head by head and in blocks of queries, for encoders of long rows on a CPU: the scores fit in its cache."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import jax
import jax.numpy as jnp
from einops import rearrange

BLOCK = 320  # queries at a time
_active: ContextVar[bool] = ContextVar("head_by_head", default=False)


@contextmanager
def head_by_head(active: bool = True) -> Iterator[None]:
    """Makes everything traced inside compute long unmasked attention with `head_attention`, if `active`.

    It is for inference: gradients would keep all scores.
    """
    token = _active.set(active)
    try:
        yield
    finally:
        _active.reset(token)


def is_head_by_head() -> bool:
    """Returns whether `head_by_head` is active."""
    return _active.get()


def head_attention(q: jax.Array, k: jax.Array, v: jax.Array, scale: float | None = None) -> jax.Array:
    """Computes `attention` without a mask; q [B, S, N, H], k and v [B, T, N, H] -> [B, S, N, H] in q's dtype."""
    batch, queries, heads, width = q.shape
    count = -(-queries // BLOCK)
    size = -(-queries // count)
    q = q * (width**-0.5 if scale is None else scale)
    padded = jnp.pad(q, [(0, 0), (0, count * size - queries), (0, 0), (0, 0)])
    blocks = rearrange(padded, "b (c s) n h -> (b n c) s h", c=count)
    keys, values = rearrange(k, "b t n h -> (b n) h t"), rearrange(v, "b t n h -> (b n) t h")

    def block(index):
        row = index // count
        scores = jnp.dot(blocks[index], keys[row], preferred_element_type=jnp.float32)
        weights = jnp.exp(scores - scores.max(axis=1, keepdims=True))
        mean = jnp.dot(weights.astype(v.dtype), values[row], preferred_element_type=jnp.float32)
        return (mean / weights.sum(axis=1, keepdims=True)).astype(q.dtype)

    found = jax.lax.map(block, jnp.arange(batch * heads * count))
    return rearrange(found, "(b n c) s h -> b (c s) n h", b=batch, n=heads)[:, :queries]
