"""Attention head by head on a CPU: values and gradients of the definition, on a mesh too, and where it is used."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mllm_jax.layers import attention as module
from mllm_jax.layers.attention import attention, whole_scores, xla_attention
from mllm_jax.layers.head_attention import BLOCK, head_attention
from mllm_jax.sharding.logical import use_mesh
from mllm_jax.sharding.mesh import MeshConfig, make_mesh


def inputs(queries: int, keys: int, dtype=jnp.float32):
    rng = np.random.default_rng(0)
    return tuple(jnp.asarray(rng.normal(size=(2, length, 4, 5)), dtype) for length in (queries, keys, keys))


def gradients(function, qkv):
    """Returns the gradients of a sum with different weights everywhere."""
    weights = jnp.cos(jnp.arange(qkv[0].size, dtype=jnp.float32)).reshape(qkv[0].shape)
    return jax.jit(jax.grad(lambda *a: (function(*a) * weights).sum(), (0, 1, 2)))(*qkv)


def agree(function, qkv, **kind):
    np.testing.assert_allclose(jax.jit(function)(*qkv), xla_attention(*qkv, **kind), atol=2e-6)
    for found, wanted in zip(gradients(function, qkv), gradients(partial(xla_attention, **kind), qkv), strict=True):
        np.testing.assert_allclose(found, wanted, atol=2e-5)


@pytest.mark.parametrize(("queries", "keys"), [(BLOCK, 20), (BLOCK + 1, 150), (3 * BLOCK - 1, 13), (128, 128)])
@pytest.mark.parametrize("scale", [None, 0.3])
def test_equals_the_definition(queries, keys, scale):
    agree(partial(head_attention, scale=scale), inputs(queries, keys), scale=scale)


def test_of_large_scores_is_finite():
    q, k, v = inputs(150, 130)
    found = head_attention(q * 1e4, k, v), *gradients(head_attention, (q * 1e4, k, v))
    assert all(np.isfinite(each).all() for each in found)


@pytest.mark.parametrize("config", [MeshConfig(data=2, fsdp=2, tensor=2), MeshConfig(data=8)])
def test_on_a_mesh(config):
    """Checks rows and heads that the mesh divides, and rows that it does not."""
    with use_mesh(make_mesh(config)):
        agree(attention, inputs(150, 140))


def test_keeps_the_dtype():
    q, k, v = inputs(BLOCK + 5, 140, jnp.bfloat16)
    found = head_attention(q, k, v)
    assert found.dtype == jnp.bfloat16 and all(
        each.dtype == jnp.bfloat16 for each in gradients(head_attention, (q, k, v))
    )
    np.testing.assert_allclose(found.astype(jnp.float32), xla_attention(*inputs(BLOCK + 5, 140)), atol=0.02)


def test_is_used_on_a_cpu_where_nothing_is_masked(monkeypatch):
    calls = []
    own = module.head_attention
    monkeypatch.setattr(module, "head_attention", lambda *args, **kwargs: calls.append(1) or own(*args, **kwargs))
    q, k, v = inputs(150, 150)
    attention(q, k, v)
    with use_mesh(make_mesh(MeshConfig(data=8))):
        attention(q, k[:, :20], v[:, :20])
    assert len(calls) == 2
    segments = jnp.ones((2, 150), jnp.int32)
    attention(q, k, v, q_segments=segments, k_segments=segments)
    attention(q, k, v, mask="causal")
    attention(q, k, v, bias=jnp.zeros((1, 1, 150, 150)))
    attention(q, k[:, :, :2], v[:, :, :2])
    attention(q[:, :4], k, v)  # a few queries, as in decoding
    with whole_scores():
        attention(q, k, v)
    assert len(calls) == 2
