"""The table of logical axes and the mesh: the mesh axes of each dimension, and the meshes that are refused."""

from __future__ import annotations

from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from jax.sharding import PartitionSpec as P

from mllm_jax.errors import ConfigError
from mllm_jax.layers.stack import scan_layers
from mllm_jax.sharding.logical import (
    RULES,
    PartRules,
    active_mesh,
    constrain,
    data_parallel,
    part_of_model,
    partition_spec,
    split_sizes,
    use_mesh,
)
from mllm_jax.sharding.mesh import MeshConfig, batch_sharding, make_mesh, param_shardings

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
        (("embed", "embed"), (4, 4), P("fsdp", None)),  # an axis splits one dimension, the first
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
        MeshConfig(data=4),  # some devices would be idle
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


def test_batches_are_split_over_rows_and_along_them():
    mesh = make_mesh(MeshConfig(data=2, context=4))
    assert batch_sharding(mesh, 3, (8, 8, 4)).spec == P("data", "context", None)  # positions, slots or patches
    assert batch_sharding(mesh, 2, (8, 6)).spec == P("data", None)
    assert batch_sharding(mesh, 1, (8,)).spec == P("data")
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
    assert constrain(x, "batch", "mlp") is x, "the mesh ends with the context"


# ---- rules of parts


@pytest.mark.parametrize(
    "axes, named",
    [
        ((("colour", ("data",)),), "'colour'"),
        ((("batch", ("data", "model")),), "'model'"),
        ((("batch", ("data", "data")),), "'data', 'data'"),
        ((("batch", "data"),), "'batch'"),
        ((("heads", ()), ("heads", ("tensor",))), "once more"),
    ],
)
def test_rules_of_parts_that_mean_nothing_are_refused(axes, named):
    with pytest.raises(ConfigError) as refusal:
        PartRules("encoder_image", axes)
    assert named in refusal.value.given and "encoder" in refusal.value.given


def test_a_part_has_rules_of_its_own_and_the_others_keep_theirs():
    mesh = make_mesh(MeshConfig(data=2, context=2, tensor=2))
    names, shape = ("batch", "heads"), (8, 8)
    with use_mesh(mesh, parts=(data_parallel("encoder_image"), PartRules("llm", (("heads", ()),)))):
        assert partition_spec(names, shape, *active_mesh()) == P("data", "tensor")
        with part_of_model("encoder_image"):
            assert partition_spec(names, shape, *active_mesh()) == P(("data", "context", "tensor"), None)
            assert split_sizes(names, shape) == [8, 1]
            with part_of_model(None):
                assert split_sizes(names, shape) == [2, 2]
        with part_of_model("llm"):
            assert split_sizes(names, shape) == [2, 1]
    assert split_sizes(names, shape) == [1, 1]
    with use_mesh(mesh), part_of_model("encoder_image"):  # images of a row are split over `context` in any case
        assert partition_spec(names, shape, *active_mesh()) == P(("data", "context"), "tensor")
        assert partition_spec(("batch", "patches"), (2, 4), *active_mesh()) == P("data", "context")


class Layer(nn.Module):
    @nn.compact
    def __call__(self, x, _):
        Parts.seen.append(active_mesh()[1]["heads"])
        return x + nn.Dense(x.shape[-1])(x), None


class Tower(nn.Module):
    @nn.compact
    def __call__(self, x):
        return scan_layers(Layer, num_layers=2, remat="full", num_broadcast=0)(name="encoder")(x, None)[0]


class Parts(nn.Module):
    seen = []

    def setup(self):
        self.encoder_image, self.llm = Tower(), Tower()

    def __call__(self, x):
        x = self.encoder_image(x)
        Parts.seen.append(active_mesh()[1]["heads"])
        return self.llm(x)


def test_what_a_part_traces_is_traced_under_its_rules():
    """Checks scanned and rematerialised layers too, and a layer of another part with the same name."""
    Parts.seen.clear()
    with use_mesh(make_mesh(EVERY), parts=(data_parallel("encoder_image"),)):
        jax.eval_shape(lambda: Parts().init_with_output(jax.random.key(0), jnp.ones((8, 4))))
    between = Parts.seen.index(("tensor",))
    assert between > 0 and set(Parts.seen[:between]) == {()} and set(Parts.seen[between:]) == {("tensor",)}
    assert len(Parts.seen) > between + 1


def test_parameters_follow_the_rules_of_their_part_and_never_those_of_activations():
    mesh = make_mesh(MeshConfig(data=1, fsdp=2, context=2, tensor=2))
    box = nn.LogicallyPartitioned
    kernel, table = box(jnp.zeros((4, 4)), ("embed", "heads")), box(jnp.zeros((4, 4)), ("patches", "embed"))
    params = {part: {"kernel": kernel, "table": table} for part in ("encoder_image", "llm")}
    found = param_shardings(params, mesh, (data_parallel("encoder_image"),))
    assert found["encoder_image"]["kernel"].spec == P("fsdp", None)
    assert found["llm"]["kernel"].spec == P("fsdp", "tensor")
    assert found["encoder_image"]["table"].spec == P(None, "fsdp"), "positions are looked up whole"
    both = param_shardings(params, mesh, (PartRules("llm", (("embed", ("fsdp", "context")),)),))
    assert both["llm"]["kernel"].spec == P(("fsdp", "context"), "tensor")


# ---- slices


@dataclass(frozen=True)
class Chip:
    """A TPU device with the attributes that a mesh reads: coordinates in a grid of 2 x 2 of one of several slices."""

    id: int
    slice_index: int
    coords: tuple[int, int, int]
    platform: str = "tpu"
    device_kind: str = "TPU v5 lite"
    core_on_chip: int = 0
    process_index: int = 0


def chips(slices: int) -> list[Chip]:
    return [Chip(4 * s + i, s, (i % 2, i // 2, 0)) for s in range(slices) for i in range(4)]


def test_data_runs_over_slices_and_nothing_else_does():
    config = MeshConfig(data=-1, fsdp=2, tensor=1)
    for devices in (chips(2), chips(2)[::-1]):
        mesh = make_mesh(config, devices)
        assert dict(mesh.shape) == dict(data=4, fsdp=2, context=1, tensor=1)
        slices = np.vectorize(lambda chip: chip.slice_index)(mesh.devices)
        assert all(len(set(row.ravel())) == 1 for row in slices), "fsdp, context and tensor stay inside a slice"
        assert len(set(slices[:2].ravel())) == len(set(slices[2:].ravel())) == 1, "data's outer part is the slice"
        assert slices[0, 0, 0, 0] != slices[2, 0, 0, 0]
    on_cpu = make_mesh(MeshConfig(fsdp=2, slices=2))
    assert on_cpu.devices.ravel().tolist() == jax.devices(), "slices follow each other as the devices do"


@pytest.mark.parametrize(
    "config, devices, expected",
    [
        (MeshConfig(data=1, fsdp=8), chips(2), "multiple of 2"),
        (MeshConfig(data=1, fsdp=8, slices=2), None, "multiple of 2"),
        (MeshConfig(slices=2), chips(1), "1 slice(s), as the devices report"),
        (MeshConfig(slices=1), chips(2), "2 slice(s), as the devices report"),
        (MeshConfig(slices=3), None, "a positive number that divides the devices"),
        (MeshConfig(slices=0), None, "a positive number that divides the devices"),
    ],
)
def test_slices_that_do_not_fit_are_refused(config, devices, expected):
    with pytest.raises(ConfigError) as refusal:
        make_mesh(config, devices)
    assert expected in refusal.value.expected and "experiment.mesh" in refusal.value.todo
