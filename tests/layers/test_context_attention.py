"""Attention on rows that are split over devices against attention on whole rows: values, gradients and memory."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mllm_jax.layers import context_attention as ring
from mllm_jax.layers.attention import attention
from mllm_jax.layers.context_gather import take_along_rows
from mllm_jax.sharding.logical import use_mesh
from mllm_jax.sharding.mesh import MeshConfig, make_mesh

ROWS, LENGTH, HEAD = 2, 32, 8
FOUR, MIXED, HEADS = (
    MeshConfig(data=1, context=4),
    MeshConfig(data=1, context=2, tensor=2),
    MeshConfig(data=1, context=1, tensor=4),
)


def mesh_of(config):
    return make_mesh(config, jax.devices()[:4])


def segments(rows: int = ROWS) -> np.ndarray:
    """Returns segments of texts of uneven lengths, one after the other, and padding."""
    ends = [[5, 6, 19, 29], [13, 20, 21, 32]]
    numbers = [np.searchsorted(row, np.arange(LENGTH), side="right") + 1 for row in ends]
    return np.stack([np.where(n > len(e), 0, n) for n, e in zip(numbers, ends, strict=True)])[:rows].astype(np.int32)


def arrays(heads: int, kv_heads: int, keys: int = LENGTH):
    rng = np.random.default_rng(0)
    sizes = (LENGTH, heads), (keys, kv_heads), (keys, kv_heads), (LENGTH, heads)
    return [rng.normal(size=(ROWS, *size, HEAD)).astype(np.float32) for size in sizes]


def values_and_gradients(given, mesh, *, bias=None, **how):
    """Returns (output, gradients by q, k, v and bias) of a loss that weighs every number of the output."""
    *qkv, weights = given

    def loss(q, k, v, bias):
        y = attention(q, k, v, bias=bias, **how)
        return (y * weights).sum(), y

    def run(*args):
        with use_mesh(mesh):
            return jax.grad(loss, argnums=range(4) if bias is not None else range(3), has_aux=True)(*args)

    return jax.jit(run if mesh else lambda *a: jax.grad(loss, range(4 if bias is not None else 3), has_aux=True)(*a))(
        *qkv, bias
    )


CASES = {
    # mesh, query heads, key heads, arguments of `attention`; `packed`: with segments
    "causal": (FOUR, 2, 2, dict(mask="causal")),
    "causal, packed, grouped": (FOUR, 4, 2, dict(mask="causal", packed=True)),
    "full, packed": (FOUR, 2, 1, dict(mask="full", packed=True)),
    "window": (FOUR, 2, 2, dict(mask="causal", window=11, packed=True)),
    "window inside one device's piece": (FOUR, 2, 2, dict(mask="causal", window=1)),
    "window that differs by layer": (FOUR, 2, 2, dict(mask="causal", window="traced")),
    "bias of heads": (MIXED, 4, 4, dict(mask="full", bias=(1, 4), packed=True, scale=1.0)),
    "bias of rows": (MIXED, 2, 2, dict(mask="causal", bias=(2, 1))),
    "heads whose keys are not split": (MIXED, 4, 1, dict(mask="causal", packed=True)),
    "keys repeated for their heads": (MIXED, 6, 3, dict(mask="causal")),
    "queries at places of their own": (FOUR, 2, 2, dict(mask="causal", at=True, packed=True)),
    "fewer queries than keys": (FOUR, 2, 2, dict(mask="full", keys=48)),
}


@pytest.mark.parametrize("name", CASES)
def test_a_split_row_gives_what_a_whole_one_gives(name, monkeypatch):
    config, heads, kv_heads, how = CASES[name]
    how = dict(how)
    given = arrays(heads, kv_heads, how.pop("keys", LENGTH))
    if how.pop("packed", False):
        how["q_segments"] = how["k_segments"] = segments()
    if how.get("window") == "traced":
        how["window"] = jnp.int32(7)
    if shape := how.pop("bias", None):
        how["bias"] = np.random.default_rng(1).normal(size=(*shape, LENGTH, LENGTH)).astype(np.float32)
    if how.pop("at", False):
        how["q_index"] = np.stack([np.random.default_rng(row).permutation(LENGTH) for row in range(ROWS)])
    called = []
    monkeypatch.setattr(
        "mllm_jax.layers.attention.context_attention",
        lambda *args, **more: called.append(1) or ring.context_attention(*args, **more, block=4),
    )
    found = values_and_gradients(given, mesh_of(config), **how)
    assert called, "the row was not split"
    for ours, whole in zip(
        jax.tree.leaves(found), jax.tree.leaves(values_and_gradients(given, None, **how)), strict=True
    ):
        np.testing.assert_allclose(ours, whole, rtol=1e-5, atol=1e-5)


def test_a_query_that_sees_nothing_gets_the_mean_of_all_values():
    """Checks texts in cross-attention that have no source: never NaN, whichever device they are on."""
    *qkv, _ = arrays(2, 2)
    how = dict(q_segments=segments(), k_segments=segments() % 3)
    with use_mesh(mesh_of(FOUR)):
        found = jax.jit(lambda q, k, v: attention(q, k, v, **how))(*qkv)
    alone = np.asarray(segments()) == 3
    mean = np.broadcast_to(qkv[2].mean(axis=1, keepdims=True), found.shape)
    np.testing.assert_allclose(found[alone], mean[alone], atol=1e-5)
    np.testing.assert_allclose(found, attention(*qkv, **how), atol=1e-5)


def test_dealing_gives_every_device_the_same_work():
    """Counts the pairs of a query and an earlier key on each device, with 4 devices and an odd number."""
    for size in (3, 4):
        how = ring._How(("context",), size, size, True, True, True, 4, 4)
        places = [np.asarray(ring._positions(how, device, 8)) for device in range(size)]
        assert sorted(np.concatenate(places)) == list(range(8 * size))
        work = [sum((p[:, None] >= other[None]).sum() for other in places) for p in places]
        assert max(work) == min(work)


@pytest.mark.parametrize(
    "config, queries, keys", [(HEADS, 32, 32), (FOUR, 30, 30), (FOUR, 1, 32), (FOUR, 32, 30)], ids=str
)
def test_rows_that_are_not_split_or_do_not_divide_are_left_to_the_partitioner(config, queries, keys):
    shapes = (ROWS, queries, 4, HEAD), (ROWS, keys, 4, HEAD)
    with use_mesh(mesh_of(config)):
        assert ring.row_split(*shapes) is None
    assert ring.row_split((ROWS, 32, 4, HEAD), (ROWS, 32, 4, HEAD)) is None, "outside a mesh"


def test_memory_grows_with_the_piece_and_not_with_its_square():
    """Checks that the passes take less than a quarter of one device's scores against the whole row (32 MiB).

    None of it is a gathered row.
    """
    length, heads = 4096, 2
    shape = jax.ShapeDtypeStruct((1, length, heads, HEAD), jnp.float32)

    def loss(q, k, v):
        with use_mesh(mesh_of(FOUR)):
            return ring.context_attention(ring.row_split(q.shape, k.shape), q, k, v, mask="causal", block=128).sum()

    compiled = jax.jit(jax.grad(loss, argnums=(0, 1, 2))).lower(shape, shape, shape).compile()
    scores = 4 * length // 4 * length * heads
    assert compiled.memory_analysis().temp_size_in_bytes < scores / 4
    text = compiled.as_text()
    assert "collective-permute(" in text and "all-gather(" not in text


def test_lookups_travel_round_the_ring():
    """Checks that each device's media reach the others; gradients return to the device of the media token."""
    rng = np.random.default_rng(0)
    media, weights = (rng.normal(size=(2, n, 3)).astype(np.float32) for n in (12, 16))
    index = rng.integers(0, 12, (2, 16)).astype(np.int32)

    def loss(media):
        found = take_along_rows(media, index)
        return (found * weights).sum(), found

    def split(media):
        with use_mesh(mesh_of(FOUR)):
            return jax.grad(loss, has_aux=True)(media)

    step = jax.jit(split).lower(media).compile()
    assert "all-gather(" not in step.as_text()
    for ours, whole in zip(step(media), jax.grad(loss, has_aux=True)(media), strict=True):
        np.testing.assert_allclose(ours, whole, atol=1e-6)
    with use_mesh(mesh_of(FOUR)):  # 11 is not divisible
        np.testing.assert_array_equal(
            take_along_rows(media[:, :11], index % 11), np.take_along_axis(media[:, :11], index[..., None] % 11, axis=1)
        )
