"""Unmasked attention on a CPU, head by head and in blocks of queries: the scores of a block fit in its cache."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from einops import rearrange

from mllm_jax.sharding.logical import active_mesh, partition_spec

BLOCK = 320  # queries at a time
_FLOAT32 = dict(preferred_element_type=jnp.float32)


def head_attention(q: jax.Array, k: jax.Array, v: jax.Array, scale: float | None = None) -> jax.Array:
    """Computes `attention` without a mask; q [B, S, N, H], k and v [B, T, N, H] -> [B, S, N, H] in q's dtype.

    The backward pass recomputes the scores (arXiv 2205.14135, in blocks of queries only). The surrounding `use_mesh`
    splits rows and heads.
    """
    queries = q.shape[1]
    blocks = -(-queries // BLOCK)
    size = -(-queries // blocks)
    q = jnp.pad(
        q * (q.shape[-1] ** -0.5 if scale is None else scale), [(0, 0), (0, blocks * size - queries), *[(0, 0)] * 2]
    )

    def local(q, k, v):
        cut = rearrange(q, "b (c s) n h -> (b n) c s h", c=blocks)
        y = _heads(cut, *(rearrange(each, "b t n h -> (b n) t h") for each in (k, v)))
        return rearrange(y, "(b n) c s h -> b (c s) n h", b=len(q))

    active = active_mesh()
    if active is not None and active[0].size > 1:
        spec = partition_spec(("batch", None, "heads", None), q.shape, *active)
        local = jax.shard_map(local, mesh=active[0], in_specs=(spec,) * 3, out_specs=spec, check_vma=False)
    return local(q, k, v)[:, :queries]


@jax.custom_vjp
def _heads(q, k, v):
    """Computes attention of each head: q [R, C, S, H] in C blocks, scaled, k and v [R, T, H] -> [R, C, S, H]."""
    return _forward(q, k, v)[0]


def _forward(q, k, v):
    rows, blocks = q.shape[:2]
    keys = k.mT

    def one(index):
        row = index // blocks
        scores = jnp.dot(q[row, index % blocks], keys[row], **_FLOAT32)
        top = scores.max(axis=1, keepdims=True)
        weights = jnp.exp(scores - top)
        total = weights.sum(axis=1, keepdims=True)
        y = jnp.dot(weights.astype(v.dtype), v[row], **_FLOAT32) / total
        return y.astype(q.dtype), top + jnp.log(total)

    y, logsumexp = jax.lax.map(one, jnp.arange(rows * blocks))
    y, logsumexp = (rearrange(each, "(r c) s h -> r c s h", r=rows) for each in (y, logsumexp))
    return y, (q, k, v, y, logsumexp)


def _backward(kept, dy):
    """Computes the scores as [T, S]: no product then has to transpose a matrix of that size, which takes most time."""
    q, k, v, y, logsumexp = kept
    inner = (y.astype(jnp.float32) * dy.astype(jnp.float32)).sum(axis=-1, keepdims=True)
    dy = dy.astype(v.dtype)

    def of_head(given):
        keys, values, blocks = given
        keys_t = keys.T

        def of_block(sums, block):
            q, q_t, dy, dy_t, logsumexp, inner = block
            weights = jnp.exp(jnp.dot(keys, q_t, **_FLOAT32) - logsumexp)
            dscores = (weights * (jnp.dot(values, dy_t, **_FLOAT32) - inner)).astype(q.dtype)
            dk = sums[0] + jnp.dot(dscores, q, **_FLOAT32)
            dv = sums[1] + jnp.dot(weights.astype(dy.dtype), dy, **_FLOAT32)
            return (dk, dv), jnp.dot(keys_t, dscores, **_FLOAT32)

        zeros = tuple(jnp.zeros(each.shape, jnp.float32) for each in (keys, values))
        return jax.lax.scan(of_block, zeros, blocks)

    (dk, dv), dq_t = jax.lax.map(of_head, (k, v, (q, q.mT, dy, dy.mT, logsumexp.mT, inner.mT)))
    return dq_t.mT.astype(q.dtype), dk.astype(k.dtype), dv.astype(v.dtype)


_heads.defvjp(_forward, _backward)
