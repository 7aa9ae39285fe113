"""Attention head by head: the same numbers as the definition, only where it is asked for and possible."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mllm_jax.layers import attention as module
from mllm_jax.layers.attention import attention, xla_attention
from mllm_jax.layers.head_attention import BLOCK, head_by_head


def inputs(queries: int, keys: int, dtype=jnp.float32):
    rng = np.random.default_rng(0)
    return tuple(jnp.asarray(rng.normal(size=(2, length, 3, 5)), dtype) for length in (queries, keys, keys))


@pytest.mark.parametrize(("queries", "keys"), [(BLOCK, 200), (BLOCK + 1, 150), (3 * BLOCK - 1, 130), (128, 128)])
@pytest.mark.parametrize("scale", [None, 0.3])
def test_equals_the_definition(queries, keys, scale, monkeypatch):
    q, k, v = inputs(queries, keys)
    calls = []
    own = module.head_attention
    monkeypatch.setattr(module, "head_attention", lambda *args: calls.append(1) or own(*args))
    with head_by_head():
        found = jax.jit(lambda *given: attention(*given, scale=scale))(q, k, v)
    assert calls
    np.testing.assert_allclose(found, xla_attention(q, k, v, scale=scale), atol=2e-6)


def test_keeps_the_dtype():
    with head_by_head():
        found = attention(*inputs(BLOCK + 5, 140, jnp.bfloat16))
    assert found.dtype == jnp.bfloat16
    np.testing.assert_allclose(found.astype(jnp.float32), xla_attention(*inputs(BLOCK + 5, 140)), atol=0.02)


def test_other_attention_stays_as_it_is(monkeypatch):
    q, k, v = inputs(150, 150)
    monkeypatch.setattr(module, "head_attention", None)
    segments = jnp.ones((2, 150), jnp.int32)
    plain = attention(q, k, v)
    with head_by_head(False):
        assert (attention(q, k, v) == plain).all()
    with head_by_head():
        attention(q, k, v, q_segments=segments, k_segments=segments)
        attention(q, k, v, mask="causal")
        attention(q[:, :4], k, v)  # a few queries, as in decoding
    assert (attention(q, k, v) == plain).all()
