"""The device mesh, and the shardings that follow from it and the logical names."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import jax
import numpy as np
from flax import linen as nn
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from mllm_jax.errors import ConfigError
from mllm_jax.sharding.logical import partition_spec

AXES = ("data", "fsdp", "context", "tensor")


@dataclass(frozen=True)
class MeshConfig:
    """Sizes of the mesh axes; one of them may be -1 and takes the devices that are left."""

    data: int = -1
    fsdp: int = 1
    context: int = 1
    tensor: int = 1


def mesh_sizes(config: MeshConfig, num_devices: int) -> tuple[int, ...]:
    """The sizes of AXES on so many devices.

    Raises:
        ConfigError: the sizes do not multiply to the number of devices.
    """
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

    Raises:
        ConfigError: the sizes do not multiply to the number of devices.
    """
    devices = list(jax.devices() if devices is None else devices)
    sizes = mesh_sizes(config, len(devices))
    axis_types = (AxisType.Auto,) * len(AXES)
    if devices[0].platform == "cpu":
        return Mesh(np.asarray(devices).reshape(sizes), AXES, axis_types=axis_types)
    # Along the axes of the chips' torus as far as the sizes allow it.
    placed = mesh_utils.create_device_mesh(sizes, devices, allow_split_physical_axes=True)
    return Mesh(placed, AXES, axis_types=axis_types)


def param_shardings(boxed, mesh: Mesh):
    """NamedShardings for parameters that linen boxed with their logical names.

    Args:
        boxed: (abstract) parameters as `module.init` returns them.
    """

    def one(leaf):
        if isinstance(leaf, nn.LogicallyPartitioned):
            return NamedSharding(mesh, partition_spec(leaf.names, leaf.value.shape, mesh))
        return NamedSharding(mesh, PartitionSpec())

    return jax.tree.map(one, boxed, is_leaf=lambda x: isinstance(x, nn.LogicallyPartitioned))


def batch_sharding(mesh: Mesh, ndim: int, shape: Sequence[int] | None = None) -> NamedSharding:
    """Rows over `data` and `fsdp`, everything else whole."""
    shape = shape if shape is not None else (mesh.shape["data"] * mesh.shape["fsdp"],) + (1,) * (ndim - 1)
    return NamedSharding(mesh, partition_spec(["batch"] + [None] * (ndim - 1), shape, mesh))
