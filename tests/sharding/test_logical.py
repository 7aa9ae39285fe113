"""The table of logical axes and the mesh: which dimension is split over what, and which meshes are refused."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from mllm_jax.errors import ConfigError
from mllm_jax.sharding.logical import RULES, constrain, partition_spec, use_mesh
from mllm_jax.sharding.mesh import MeshConfig, batch_sharding, make_mesh

EVERY = MeshConfig(data=2, fsdp=2, tensor=2)


@pytest.mark.parametrize(
    "names,shape,spec",
    [
        (("batch", "seq", None), (8, 6, 5), P(("data", "fsdp"), None, None)),
        (("batch", "seq"), (2, 6), P("data", None)),  # 2 rows fill `data`, nothing is left for `fsdp`
        (("batch", "seq"), (3, 6), P(None, None)),  # nothing divides
        (("embed", "mlp"), (4, 6), P("fsdp", "tensor")),
        (("embed", "mlp"), (5, 6), P(None, "tensor")),
        (("embed", "mlp"), (4, 7), P("fsdp", None)),
        (("layers", "embed", "heads", "head_dim"), (2, 4, 6, 8), P(None, "fsdp", "tensor", None)),
        (("layers", "embed", "kv_heads", "head_dim"), (2, 4, 1, 8), P(None, "fsdp", None, None)),
        (("vocab", "embed"), (10, 4), P("tensor", "fsdp")),
        (("embed", "embed"), (4, 4), P("fsdp", None)),  # an axis serves one dimension, the first
        (("embed", "embed"), (3, 4), P(None, "fsdp")),  # … that it divides
        (("channels", "patches"), (4, 4), P(None, None)),
        ((None, None), (8, 8), P(None, None)),
        ((), (), P()),
    ],
)
def test_partition_spec(names, shape, spec):
    assert partition_spec(names, shape, make_mesh(EVERY)) == spec


def test_mesh_axes_of_size_one_are_not_named():
    mesh = make_mesh(MeshConfig(data=8))
    assert partition_spec(("batch", "embed", "mlp"), (8, 8, 8), mesh) == P("data", None, None)


def test_context_splits_the_sequence():
    mesh = make_mesh(MeshConfig(data=4, context=2))
    assert partition_spec(("batch", "seq", None), (4, 6, 5), mesh) == P("data", "context", None)


def test_another_table_needs_no_other_model():
    mesh = make_mesh(EVERY)
    rules = dict(RULES) | {"embed": ("fsdp", "tensor"), "mlp": ()}
    assert partition_spec(("embed", "mlp"), (8, 8), mesh, rules) == P(("fsdp", "tensor"), None)


def test_unknown_name_and_wrong_rank_are_refused():
    mesh = make_mesh(EVERY)
    with pytest.raises(KeyError, match="colour"):
        partition_spec(("colour",), (4,), mesh)
    with pytest.raises(ValueError):
        partition_spec(("embed",), (4, 4), mesh)


def test_make_mesh_fills_in_the_rest():
    assert dict(make_mesh(MeshConfig()).shape) == dict(data=8, fsdp=1, context=1, tensor=1)
    assert dict(make_mesh(MeshConfig(data=2, fsdp=-1, tensor=2)).shape) == dict(data=2, fsdp=2, context=1, tensor=2)
    four = make_mesh(MeshConfig(fsdp=2), jax.devices()[:4])
    assert dict(four.shape) == dict(data=2, fsdp=2, context=1, tensor=1)
    assert four.devices.ravel().tolist() == jax.devices()[:4]


@pytest.mark.parametrize(
    "config",
    [
        MeshConfig(data=3),
        MeshConfig(data=16),
        MeshConfig(data=4),  # some devices would stay idle
        MeshConfig(data=-1, fsdp=3),
        MeshConfig(data=-1, fsdp=-1),
        MeshConfig(data=0),
        MeshConfig(data=-2, fsdp=-4),
    ],
    ids=str,
)
def test_impossible_meshes_are_refused(config):
    with pytest.raises(ConfigError) as refusal:
        make_mesh(config)
    assert "8 device(s)" in refusal.value.given and refusal.value.expected and "mesh" in refusal.value.todo


def test_batches_are_split_over_rows_only():
    mesh = make_mesh(EVERY)
    assert batch_sharding(mesh, 3, (8, 6, 4)).spec == P(("data", "fsdp"), None, None)
    assert batch_sharding(mesh, 2).spec == P(("data", "fsdp"), None)
    assert batch_sharding(mesh, 1, (3,)).spec == P(None)


def test_constrain_pins_inside_a_mesh_and_does_nothing_outside():
    x = jnp.arange(32.0).reshape(8, 4)
    assert constrain(x, "batch", "mlp") is x
    mesh = make_mesh(EVERY)
    with use_mesh(mesh):
        y = jax.jit(lambda x: constrain(x * 1, "batch", "mlp"))(x)
    assert y.sharding.is_equivalent_to(jax.NamedSharding(mesh, P(("data", "fsdp"), "tensor")), 2)
    np.testing.assert_array_equal(x, y)
    assert constrain(x, "batch", "mlp") is x, "the mesh is left behind with the context"
