"""Every implementation of attention against the plain one: values, gradients, and the choice by platform."""

from __future__ import annotations

import importlib.util
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mllm_jax.layers import attention as layer
from mllm_jax.layers.attention import attention, xla_attention
from mllm_jax.layers.context_attention import blockwise_attention
from mllm_jax.layers.cudnn import cudnn_supports
from mllm_jax.layers.splash import splash_attention, splash_supports
from mllm_jax.sharding.logical import use_mesh
from mllm_jax.sharding.mesh import MeshConfig, make_mesh

LENGTH = 200  # two blocks of lanes, the second not full


@pytest.fixture(scope="module")
def qkv():
    rng = np.random.default_rng(0)
    return tuple(jnp.asarray(rng.normal(size=(2, LENGTH, n, 16)), jnp.float32) for n in (4, 2, 2))


@pytest.fixture(scope="module")
def segments():
    """Returns segments of texts of different lengths, and of padding, which is a segment too."""
    rows = [np.repeat([1, 2, 3, 0], [70, 75, 40, 15]), np.repeat([1, 2], [129, 71])]
    return jnp.asarray(np.stack(rows), jnp.int32)


def gradients(function, qkv):
    """Returns the value and gradients of a sum with different weights everywhere."""
    weights = jnp.cos(jnp.arange(qkv[0].size, dtype=jnp.float32)).reshape(qkv[0].shape)
    with jax.default_matmul_precision("highest"):
        return jax.jit(jax.value_and_grad(lambda *a: (function(*a) * weights).sum(), (0, 1, 2)))(*qkv)


def agree(function, qkv, **kind):
    found, wanted = gradients(partial(function, **kind), qkv), gradients(partial(xla_attention, **kind), qkv)
    np.testing.assert_allclose(found[0], wanted[0], rtol=2e-5)
    for one, other in zip(found[1], wanted[1], strict=True):
        np.testing.assert_allclose(one, other, atol=2e-5)


KINDS = {
    "full": dict(),
    "packed": dict(segments=True),
    "causal": dict(mask="causal", scale=0.3),
    "packed causal": dict(mask="causal", segments=True),
    "packed window": dict(mask="causal", segments=True, window=37),
}


def kind_of(name, segments) -> dict:
    kind = dict(KINDS[name])
    return kind | (dict(q_segments=segments, k_segments=segments) if kind.pop("segments", False) else {})


@pytest.mark.parametrize("name", ["full", "packed causal", "packed window"])
def test_splash(name, qkv, segments):
    agree(partial(splash_attention, interpret=True), qkv, **kind_of(name, segments))


def test_splash_between_texts_of_different_lengths(qkv):
    q, k, v = qkv
    agree(partial(splash_attention, interpret=True), (q[:, :130], k, v))


@pytest.mark.parametrize("name", KINDS)
def test_blocks(name, qkv, segments):
    agree(partial(blockwise_attention, block=64), qkv, **kind_of(name, segments))


def test_blocks_with_places_of_a_cache_and_a_window_that_is_computed(qkv, segments):
    q, k, v = qkv
    index = jnp.stack([jnp.arange(50) + 100, jnp.arange(50) * 4])
    at = jnp.take_along_axis(segments, index, axis=1)
    kind = dict(mask="causal", q_index=index, q_segments=at, k_segments=segments, window=jnp.int32(90))
    agree(partial(blockwise_attention, block=64), (q[:, :50], k, v), **kind)


@pytest.mark.parametrize(
    "function", [partial(splash_attention, interpret=True), partial(blockwise_attention, block=64)]
)
def test_a_query_that_sees_nothing_is_finite_and_so_is_its_gradient(function, qkv, segments):
    value, found = gradients(partial(function, q_segments=segments * 0 + 9, k_segments=segments), qkv)
    assert np.isfinite(value) and all(np.isfinite(each).all() for each in found)


@pytest.mark.parametrize("config", [MeshConfig(data=2, fsdp=2, tensor=2), MeshConfig(data=1, fsdp=2, tensor=4)])
def test_splash_on_a_mesh(config, qkv, segments):
    """Checks that each head gets its own keys if `tensor` divides the heads but not the key heads."""
    mesh = make_mesh(config)
    kind = dict(mask="causal", q_segments=segments, k_segments=segments)
    found = jax.jit(partial(splash_attention, mesh=mesh, interpret=True, **kind))(*qkv)
    np.testing.assert_allclose(found, xla_attention(*qkv, **kind), atol=2e-5)


def test_what_the_kernels_cannot_do():
    q, few = jnp.zeros((1, 256, 2, 64), jnp.bfloat16), jnp.zeros((1, 128, 2, 64), jnp.bfloat16)
    assert splash_supports(q, q, "causal", 4) and splash_supports(few, q, "full", None)
    assert not splash_supports(few, q, "causal", None), "places of the queries among the keys"
    assert not splash_supports(q, q, "causal", jnp.int32(4)), "a window that is not known while compiling"
    assert cudnn_supports(q, "causal", 4) and not cudnn_supports(q.astype(jnp.float32), "causal", None)
    assert not cudnn_supports(jnp.zeros((1, 256, 2, 256), jnp.bfloat16), "full", None)


def test_long_rows_are_taken_block_by_block(monkeypatch, qkv, segments):
    kind = dict(mask="causal", q_segments=segments, k_segments=segments)
    plain = str(jax.make_jaxpr(partial(attention, **kind))(*qkv))
    monkeypatch.setattr(layer, "LONG", LENGTH)
    assert "scan" in str(jax.make_jaxpr(partial(attention, **kind))(*qkv)) and "scan" not in plain
    with layer.whole_scores():
        assert str(jax.make_jaxpr(partial(attention, **kind))(*qkv)) == plain


def test_on_a_cpu_causal_rows_are_taken_block_by_block_earlier(monkeypatch, qkv, segments):
    monkeypatch.setattr(layer, "CPU_LONG", LENGTH)
    kind = dict(q_segments=segments, k_segments=segments)
    with use_mesh(make_mesh(MeshConfig(data=2), jax.devices()[:2])):
        found = {mask: str(jax.make_jaxpr(partial(attention, mask=mask, **kind))(*qkv)) for mask in layer.MASKS}
        y = jax.jit(partial(attention, mask="causal", **kind))(*qkv)
    assert "scan" in found["causal"] and "scan" not in found["full"]
    np.testing.assert_allclose(y, xla_attention(*qkv, mask="causal", **kind), atol=2e-5)


def test_the_platform_that_is_compiled_for_decides(qkv, require_asset):
    """Checks programs for a TPU slice: splash with a mesh of TPUs, none with one of CPUs or with a cache."""
    require_asset(importlib.util.find_spec("libtpu"), "libtpu, of the extra `test`")
    from mllm_jax.planning.compile import topology_mesh
    from mllm_jax.planning.topologies import topology

    q, k, v = (jnp.concatenate([x] * 8) for x in qkv)
    index = jnp.broadcast_to(jnp.arange(LENGTH), (16, LENGTH))

    def traced(mesh, **kind):
        with use_mesh(mesh):
            return str(jax.make_jaxpr(partial(attention, mask="causal", **kind))(q, k, v))

    tpus = topology_mesh(MeshConfig(data=1, fsdp=-1), topology("v5e-16"))
    assert "splash" in traced(tpus) and "splash" not in traced(tpus, q_index=index)
    assert "splash" not in traced(make_mesh(MeshConfig(data=8)))
