"""Matrices gathered for one use: equal values and gradients, the communicated dtype, and axes of the torus."""

from __future__ import annotations

from itertools import product

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from jax.sharding import AxisType, Mesh, PartitionSpec

from mllm_jax.layers.linear import Embedding, Linear
from mllm_jax.layers.stack import REMAT_POLICIES, scan_layers
from mllm_jax.sharding.fsdp import gather, gather_plan, scatter_sum, torus_sizes
from mllm_jax.sharding.logical import use_mesh
from mllm_jax.sharding.mesh import MeshConfig, make_mesh


@pytest.mark.parametrize(
    "order, sizes",
    [((0, 1, 2), (2, 3, 4)), ((2, 0, 1), (4, 2, 3)), ((1, 2, 0), (3, 4, 2))],
)
def test_the_torus_is_found_in_the_order_of_its_axes(order, sizes):
    """Checks the coordinates of a grid 2 x 3 x 4, listed with different slowest axes."""
    ranges = [range((2, 3, 4)[axis]) for axis in order]
    coords = [tuple(place[order.index(axis)] for axis in range(3)) for place in product(*ranges)]
    assert torus_sizes(coords) == sizes
    assert torus_sizes(coords[:12]) == sizes[1:] if sizes[0] == 2 else True
    assert torus_sizes(coords[::-1]) == (24,), "not in row-major order"
    assert torus_sizes([None] * 8) == (8,), "devices without a place"


@pytest.mark.parametrize("dim", [0, 1])
@pytest.mark.parametrize("sizes", [(2, 4), (2, 2, 2)])
def test_along_the_torus_a_matrix_is_gathered_and_each_device_gets_its_part_of_a_sum(sizes, dim):
    axes = tuple("abc"[: len(sizes)])
    grid = Mesh(np.asarray(jax.devices()).reshape(sizes), axes, axis_types=(AxisType.Auto,) * len(axes))
    x = jnp.asarray(np.random.default_rng(0).normal(size=(8, 16, 16)), jnp.float32)  # one matrix a device
    split = PartitionSpec(*[None] * dim, axes)

    def on_grid(function, given, made):
        return jax.jit(jax.shard_map(function, mesh=grid, in_specs=given, out_specs=made, check_vma=False))

    total = on_grid(lambda x: scatter_sum(x[0], axes, dim), PartitionSpec(axes), split)(x)
    np.testing.assert_allclose(total, x.sum(axis=0), rtol=1e-5, atol=1e-6)
    whole = on_grid(lambda x: gather(x, axes, dim), split, PartitionSpec())(x[0])
    np.testing.assert_array_equal(whole, x[0])


class Model(nn.Module):
    """An embedding, a linear map whose inputs are split, one whose outputs are, and the embedding as a head."""

    dtype: str = "float32"

    @nn.compact
    def __call__(self, ids):
        embedding = Embedding(24, 16, dtype=self.dtype, name="embedding")
        x = Linear((4, 8), ("embed", "heads", "head_dim"), use_bias=True, dtype=self.dtype, name="up")(embedding(ids))
        x = Linear((16,), ("heads", "head_dim", "embed"), in_ndim=2, dtype=self.dtype, name="down")(jnp.tanh(x))
        return embedding.attend(x)


@pytest.fixture(scope="module")
def ids():
    return jnp.asarray(np.random.default_rng(0).integers(0, 24, (8, 5)), jnp.int32)


@pytest.fixture(scope="module")
def params(ids):
    return nn.meta.unbox(Model().init(jax.random.key(0), ids))["params"]


def loss(params, ids, mesh=None, dtype="float32"):
    def value():
        return jnp.square(Model(dtype).apply({"params": params}, ids).astype(jnp.float32)).sum()

    if mesh is None:
        return value()
    with use_mesh(mesh):
        return value()


@pytest.mark.parametrize(
    "config", [MeshConfig(1, 8), MeshConfig(2, 4), MeshConfig(2, 2, 1, 2), MeshConfig(1, 2, 2, 2), MeshConfig(8)]
)
def test_values_and_gradients_are_those_of_one_device(config, ids, params):
    mesh = make_mesh(config)
    found = jax.jit(jax.value_and_grad(lambda p: loss(p, ids, mesh)))(params)
    wanted = jax.jit(jax.value_and_grad(lambda p: loss(p, ids)))(params)
    jax.tree.map(lambda one, other: np.testing.assert_allclose(one, other, rtol=2e-4, atol=2e-4), found, wanted)


def test_the_wire_carries_what_is_computed_in(ids, params):
    """Checks that with bf16 every gather of a matrix and every scatter of a gradient is in bf16."""
    mesh = make_mesh(MeshConfig(1, 8))
    text = str(jax.make_jaxpr(jax.grad(lambda p: loss(p, ids, mesh, "bfloat16")))(params))
    lines = [line for line in text.splitlines() if " all_gather[" in line or " reduce_scatter[" in line]
    assert len(lines) == 8, "four uses of a matrix, each gathered once and scattered once"
    assert all(":bf16[" in line for line in lines)


def test_rows_that_do_not_divide_are_left_to_the_partitioner():
    with use_mesh(make_mesh(MeshConfig(1, 8))):
        assert gather_plan((16, 4), ("embed", "mlp"), (8, 3)).dim == 0
        assert gather_plan((4, 16), ("mlp", "embed"), (8, 3)).dim == 1
        assert gather_plan((16, 4), ("embed", "mlp"), (6, 3)) is None
        assert gather_plan((15, 4), ("embed", "mlp"), (8, 3)) is None
        assert gather_plan((16, 4), ("channels", "mlp"), (8, 3)) is None
    assert gather_plan((16, 4), ("embed", "mlp"), (8, 3)) is None


class Block(nn.Module):
    @nn.compact
    def __call__(self, x, _):
        return x + jnp.sin(Linear((16,), ("embed", None), name="linear")(x)), None


@pytest.mark.parametrize("remat", sorted(set(REMAT_POLICIES) - {"offload"}))
def test_no_policy_keeps_a_gathered_matrix(remat):
    """Checks that a stack of three layers stores no matrix for its backward pass but the sharded one."""
    model = scan_layers(Block, num_layers=3, remat=remat, num_broadcast=0)()
    x = jnp.ones((8, 16))
    params = nn.meta.unbox(model.init(jax.random.key(0), x, None))

    def value(params, x):
        with use_mesh(make_mesh(MeshConfig(1, 8))):
            return model.apply(params, x, None)[0].sum()

    _, pull = jax.vjp(value, params, x)
    kept = [leaf for leaf in jax.tree.leaves(pull) if getattr(leaf, "shape", None) == (3, 16, 16)]
    assert len(kept) <= 1, "the sharded one"
