"""Explicit fully sharded parameters: a matrix is gathered for one use, and its gradient returns as shards.

By itself, the partitioner may gather in the dtype that the parameters are stored in, and it sums a gradient with an
all-reduce, of which each device keeps its part: twice the bytes. Here a matrix is cast before it is communicated. Its
gradient is reduce-scattered along one axis of the chips' torus after the other, which the TPU compiler keeps (it turns
a scatter along several axes at once into an all-reduce).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import lru_cache, partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import AxisType, Mesh, PartitionSpec

from mllm_jax.sharding.cpu import check_sum
from mllm_jax.sharding.logical import active_mesh, axes_of, partition_spec

# The name of gathered matrices in rematerialisation policies: they are never kept for the backward pass.
GATHERED = "gathered"


class GatherPlan(NamedTuple):
    """The axes along which a matrix is gathered.

    Attributes:
        mesh: the active mesh with `fsdp` cut into axes of the chips' torus.
        rows: the axes that the batch is split over; `gathered` are those that the matrix is split over too.
        dim: the dimension of the matrix that is split.
    """

    mesh: Mesh
    rows: tuple[str, ...]
    gathered: tuple[str, ...]
    dim: int

    @property
    def shard(self) -> PartitionSpec:
        return PartitionSpec(*[None] * self.dim, self.gathered)


def with_gathered(function: Callable, x: jax.Array, matrix: jax.Array, names: Sequence[str | None], dtype) -> jax.Array:
    """Returns function(x, matrix in dtype), with the matrix gathered for this one use.

    If `gather_plan` returns None, the partitioner decides.

    Args:
        function: works on rows independently: x and its result have the same first dimension.
        x: [B, ...], rows of the batch.
        names: the logical names of the matrix's dimensions.
    """
    plan = gather_plan(matrix.shape, names, x.shape)
    if plan is None:
        return function(x, matrix.astype(dtype))

    def local(x, shard):
        return function(x, gather(shard.astype(dtype), plan.gathered, plan.dim))

    rows = PartitionSpec(plan.rows)
    return jax.shard_map(
        local,
        mesh=plan.mesh,
        in_specs=(rows, plan.shard),
        out_specs=rows,
        axis_names=frozenset(plan.rows),
        check_vma=False,
    )(x, matrix)


def fully_sharded() -> bool:
    """Returns whether the surrounding `use_mesh` splits parameters over `fsdp`."""
    active = active_mesh()
    return active is not None and active[0].shape["fsdp"] > 1


def gather_plan(shape: Sequence[int], names: Sequence[str | None], batch: Sequence[int]) -> GatherPlan | None:
    """Returns how to gather a matrix that is split over `fsdp` for rows that are split over it as well.

    Args:
        batch: shape of the matrix's input, rows first.

    Returns:
        None without a mesh, or if the matrix or the rows are not split over `fsdp`, or if they share another axis.
    """
    if not fully_sharded() or not batch:
        return None
    mesh, rules = active_mesh()
    rows = row_axes(batch)
    split = [axes_of(axes) for axes in partition_spec(names, shape, mesh, rules)]
    shared = [axis for axes in split for axis in axes if axis in rows]
    if shared != ["fsdp"] or ("fsdp",) not in split:
        return None
    cut, gathered = cut_along_torus(mesh)
    index = rows.index("fsdp")
    return GatherPlan(cut, (*rows[:index], *gathered, *rows[index + 1 :]), gathered, split.index(("fsdp",)))


def row_axes(batch: Sequence[int]) -> tuple[str, ...]:
    """Returns the axes of the active mesh that the first dimension of a batch of this shape is split over."""
    return axes_of(partition_spec(("batch",), batch[:1], *active_mesh())[0])


@lru_cache
def cut_along_torus(mesh: Mesh) -> tuple[Mesh, tuple[str, ...]]:
    """Returns the same devices in the same order, with `fsdp` cut into one axis per axis of the chips' torus."""
    sizes = torus_sizes([getattr(device, "coords", None) for device in np.moveaxis(mesh.devices, 1, 0)[:, 0, 0, 0]])
    axes = tuple(f"fsdp_{i}" for i in range(len(sizes)))
    names = ("data", *axes, "context", "tensor")
    shape = (mesh.shape["data"], *sizes, mesh.shape["context"], mesh.shape["tensor"])
    return Mesh(mesh.devices.reshape(shape), names, axis_types=(AxisType.Auto,) * len(names)), axes


def torus_sizes(coords: Sequence[Sequence[int] | None]) -> tuple[int, ...]:
    """Returns the sizes of the grid that devices at these coordinates form in row-major order, slowest axis first.

    Devices without coordinates, or in another order, form one axis.
    """
    if any(point is None for point in coords):
        return (len(coords),)
    points = np.asarray(coords)
    points = points - points[0]
    # Each coordinate that changes is an axis; the one that first changes last is the slowest.
    moving = [axis for axis in range(points.shape[1]) if points[:, axis].any()]
    moving.sort(key=lambda axis: -int(points[:, axis].nonzero()[0][0]))
    sizes = tuple(len(np.unique(points[:, axis])) for axis in moving)
    if not sizes or math.prod(sizes) != len(coords):
        return (len(coords),)
    for axis, index in zip(moving, np.unravel_index(np.arange(len(coords)), sizes), strict=True):
        if not np.array_equal(points[:, axis], np.unique(points[:, axis])[index]):
            return (len(coords),)
    return sizes


@partial(jax.custom_vjp, nondiff_argnums=(1, 2))
def gather(shard: jax.Array, axes: tuple[str, ...], dim: int) -> jax.Array:
    """Gathers a matrix that is split over mesh axes along one dimension; for use inside `shard_map`.

    On a torus of three axes the matrix is gathered along one axis after the other: for a gather along all at once, the
    TPU compiler makes an all-reduce of zeros and the shard. Two axes are gathered at once and communicate at the same
    time.
    """
    whole = shard
    for step in [axes] if len(axes) < 3 else reversed(axes):
        whole = jax.lax.all_gather(whole, step, axis=dim, tiled=True)
    return checkpoint_name(whole, GATHERED)


def scatter_sum(whole: jax.Array, axes: tuple[str, ...], dim: int) -> jax.Array:
    """Computes the transpose of `gather`: sums over all devices, and each keeps its part."""
    if (active := active_mesh()) is not None:
        check_sum(whole.dtype, active[0])
    sizes = [jax.lax.axis_size(axis) for axis in axes]
    whole = jnp.moveaxis(whole, dim, 0)
    parts = whole.reshape(*sizes, whole.shape[0] // math.prod(sizes), *whole.shape[1:])
    # The axis along which the dimension's neighbours lie goes first: it then sends the whole matrix over the shortest
    # distance, and each further axis sends a part of the rest.
    for index in reversed(range(len(axes))):
        parts = jax.lax.psum_scatter(parts, axes[index], scatter_dimension=index, tiled=False)
    return jnp.moveaxis(parts, 0, dim)


gather.defvjp(
    lambda shard, axes, dim: (gather(shard, axes, dim), None),
    lambda axes, dim, _, cotangent: (scatter_sum(cotangent, axes, dim),),
)
