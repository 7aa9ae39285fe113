"""Attention against a loop over queries in numpy: grouped keys, causal order, segments, places in a cache."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mllm_jax.layers.attention import attention


def by_loops(q, k, v, *, mask, q_segments=None, k_segments=None, q_index=None):
    """The definition, one query and one head at a time, in float64."""
    rows, queries, heads, size = q.shape
    group = heads // k.shape[2]
    out = np.zeros(q.shape)
    for b in range(rows):
        for s in range(queries):
            place = s if q_index is None else q_index[b, s]
            seen = [
                t
                for t in range(k.shape[1])
                if (mask == "full" or t <= place) and (q_segments is None or q_segments[b, s] == k_segments[b, t])
            ]
            for n in range(heads):
                scores = np.array([q[b, s, n] @ k[b, t, n // group] for t in seen]) / size**0.5
                weights = np.exp(scores - scores.max())
                out[b, s, n] = (weights / weights.sum()) @ np.array([v[b, t, n // group] for t in seen])
    return out


def random_qkv(queries=6, keys=6, heads=4, kv_heads=2, size=5):
    rng = np.random.default_rng(0)
    return (
        rng.normal(size=(2, queries, heads, size)).astype(np.float32),
        rng.normal(size=(2, keys, kv_heads, size)).astype(np.float32),
        rng.normal(size=(2, keys, kv_heads, size)).astype(np.float32),
    )


SEGMENTS = np.array([[1, 1, 2, 2, 2, 0], [1, 2, 2, 3, 3, 3]])
INDEX = np.array([[2, 3, 4], [1, 2, 5]])


@pytest.mark.parametrize(
    "kind",
    [
        dict(mask="full"),
        dict(mask="causal"),
        dict(mask="full", q_segments=SEGMENTS, k_segments=SEGMENTS),
        dict(mask="causal", q_segments=SEGMENTS, k_segments=SEGMENTS),
        dict(mask="causal", q_index=INDEX),
        dict(mask="causal", q_index=INDEX, q_segments=np.take_along_axis(SEGMENTS, INDEX, 1), k_segments=SEGMENTS),
    ],
    ids=["full", "causal", "segments", "packed", "cache", "packed cache"],
)
@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_equals_the_definition(kind, kv_heads):
    q, k, v = random_qkv(queries=3 if "q_index" in kind else 6, kv_heads=kv_heads)
    np.testing.assert_allclose(attention(q, k, v, **kind), by_loops(q, k, v, **kind), atol=2e-6)


def test_a_query_that_sees_nothing_is_finite_and_so_is_its_gradient():
    q, k, v = map(jnp.asarray, random_qkv())
    segments = jnp.asarray(SEGMENTS)

    def total(q, k, v):
        return attention(q, k, v, q_segments=segments * 0 + 9, k_segments=segments).sum()

    out = attention(q, k, v, q_segments=segments * 0 + 9, k_segments=segments)
    mean = np.repeat(np.asarray(v).mean(axis=1, keepdims=True), 2, axis=2)
    np.testing.assert_allclose(out, np.broadcast_to(mean, out.shape), atol=1e-6)
    assert all(np.isfinite(g).all() for g in jax.grad(total, argnums=(0, 1, 2))(q, k, v))


def test_softmax_is_float32_when_inputs_are_bfloat16():
    """With 4096 equal scores bf16 weights would not add up; in float32 the mean of the values comes out."""
    q = jnp.zeros((1, 1, 1, 2), jnp.bfloat16)
    k = jnp.zeros((1, 4096, 1, 2), jnp.bfloat16)
    v = jnp.ones((1, 4096, 1, 2), jnp.bfloat16)
    out = attention(q, k, v)
    assert out.dtype == jnp.bfloat16
    np.testing.assert_allclose(np.asarray(out, np.float32), 1.0, atol=1e-2)


def test_unknown_mask_is_refused():
    q, k, v = random_qkv()
    with pytest.raises(ValueError, match="sideways.*causal"):
        attention(q, k, v, mask="sideways")
