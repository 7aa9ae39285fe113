"""The device mesh, and shardings from the mesh and logical names."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import jax
import numpy as np
from flax import linen as nn
from jax.experimental import mesh_utils
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

from mllm_jax.errors import ConfigError
from mllm_jax.sharding.cpu import prepare_cpu, warn_of_wrong_sums
from mllm_jax.sharding.logical import ACTIVATIONS, AXES, RULES, PartRules, partition_spec, table_of_part


@dataclass(frozen=True)
class MeshConfig:
    """Sizes of the mesh axes; one of them may be -1 and takes the remaining devices.

    Attributes:
        slices: number of groups of devices with a fast network inside (TPU slices), joined by a slow one. The outer
            part of `data` is split over slices, every other axis stays inside one: only gradients cross the slow
            network, once a step. None: the number that the devices report, 1 if they report none.
    """

    data: int = -1
    fsdp: int = 1
    context: int = 1
    tensor: int = 1
    slices: int | None = None


def mesh_sizes(config: MeshConfig, num_devices: int) -> tuple[int, ...]:
    """Returns the sizes of AXES on these devices. Raises ConfigError unless their product is the number of devices."""
    sizes = [getattr(config, axis) for axis in AXES]
    given = f"mesh {dict(zip(AXES, sizes, strict=True))} on {num_devices} device(s)"
    if sizes.count(-1) > 1 or any(size == 0 or size < -1 for size in sizes):
        raise ConfigError(given, "positive sizes, at most one of them -1", "set the sizes of experiment.mesh")
    known = math.prod(size for size in sizes if size != -1)
    if -1 in sizes and num_devices % known == 0:
        sizes[sizes.index(-1)] = num_devices // known
    if math.prod(sizes) != num_devices:
        raise ConfigError(
            given,
            f"sizes whose product is {num_devices}",
            "change experiment.mesh, or on a CPU experiment.cpu_devices",
        )
    return tuple(sizes)


def make_mesh(config: MeshConfig, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """Arranges the devices as data x fsdp x context x tensor.

    TPU devices, including those of a topology that is only compiled for, are arranged so that neighbours on the mesh
    are neighbours in the torus. Other devices keep their order, in which devices of one slice follow each other.

    Raises:
        ConfigError: the product of the sizes is not the number of devices; slices that do not divide `data`, or that
            differ from the devices' slices.
    """
    if devices is None:  # existing devices have started XLA already, and those of a plan are not CPUs
        prepare_cpu()
    devices = list(jax.devices() if devices is None else devices)
    if devices[0].platform == "cpu":
        warn_of_wrong_sums()
    sizes = mesh_sizes(config, len(devices))
    slices = _slices(config, devices)
    if sizes[0] % slices:
        raise ConfigError(
            f"mesh {dict(zip(AXES, sizes, strict=True))} in {slices} slices",
            f"`data` a multiple of {slices}: no other axis crosses slices",
            "raise experiment.mesh.data, and lower another axis",
        )
    return Mesh(_arranged(sizes, slices, devices), AXES, axis_types=(AxisType.Auto,) * len(AXES))


def make_fitting_mesh(config: MeshConfig, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """Returns the mesh of `make_mesh` if the config fits the devices; else one that splits the weights (`fsdp`).

    For commands that read a run without training it: a run of 256 chips opens on one device.
    """
    try:
        return make_mesh(config, devices)
    except ConfigError:
        return make_mesh(MeshConfig(data=1, fsdp=-1), devices)


def _slices(config: MeshConfig, devices: Sequence[jax.Device]) -> int:
    """Returns the number of slices that the devices form."""
    numbers = [getattr(device, "slice_index", None) for device in devices]
    # A TPU without a slice index belongs to the only slice.
    reported = None not in numbers or devices[0].platform == "tpu"
    found = len(set(numbers)) if reported else 1
    slices = found if config.slices is None else config.slices
    if slices < 1 or len(devices) % slices or (reported and slices != found):
        raise ConfigError(
            f"mesh of {slices} slices on {len(devices)} device(s)" + (f" of {found} slice(s)" if reported else ""),
            f"{found} slice(s), as the devices report" if reported else "a positive number that divides the devices",
            "change experiment.mesh.slices, or leave it out",
        )
    return slices


def _arranged(sizes: Sequence[int], slices: int, devices: list[jax.Device]) -> np.ndarray:
    if devices[0].platform != "tpu":
        return np.asarray(devices).reshape(sizes)
    if slices > 1:
        inner, outer = [sizes[0] // slices, *sizes[1:]], [slices, 1, 1, 1]
        return mesh_utils.create_hybrid_device_mesh(inner, outer, devices, allow_split_physical_axes=True)
    return mesh_utils.create_device_mesh(sizes, devices, allow_split_physical_axes=True)


def param_shardings(boxed, mesh: Mesh | AbstractMesh, parts: Sequence[PartRules] = ()):
    """Returns NamedShardings for parameters that linen boxed with their logical names.

    Args:
        boxed: (abstract) parameters as `module.init` returns them.
        parts: rules of parts of the model; the first key of a parameter's path is its part.
    """
    whole = dict.fromkeys(ACTIVATIONS, ())

    def one(path, leaf):
        if not isinstance(leaf, nn.LogicallyPartitioned):
            return NamedSharding(mesh, PartitionSpec())
        own = table_of_part(path[0].key, parts) if path else {}
        spec = partition_spec(leaf.names, leaf.value.shape, mesh, {**RULES, **own, **whole})
        return NamedSharding(mesh, spec)

    return jax.tree_util.tree_map_with_path(one, boxed, is_leaf=lambda x: isinstance(x, nn.LogicallyPartitioned))


def batch_sharding(mesh: Mesh, ndim: int, shape: Sequence[int] | None = None) -> NamedSharding:
    """Splits rows over `data` and `fsdp`, and a row's positions, media slots or patches over `context`."""
    shape = shape if shape is not None else (mesh.shape["data"] * mesh.shape["fsdp"],) + (1,) * (ndim - 1)
    names = ("batch", "seq")[:ndim] + (None,) * (ndim - 2)
    return NamedSharding(mesh, partition_spec(names, shape, mesh))
