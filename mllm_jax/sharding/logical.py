"""Logical axes: one table says which mesh axes each named dimension is split over.

Parameters and activations carry names (`batch`, `embed`, `heads`, ...); nothing but `RULES` knows the mesh. Changing
the parallelism edits the table, never a model.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

RULES: Mapping[str, tuple[str, ...]] = {
    "batch": ("data", "fsdp"),
    "seq": ("context",),
    "embed": ("fsdp",),
    "heads": ("tensor",),
    "kv_heads": ("tensor",),
    "head_dim": (),
    "mlp": ("tensor",),
    "vocab": ("tensor",),
    "layers": (),
    "slots": (),
    "patches": (),
    "queries": (),
    "channels": (),
}

_active: ContextVar[tuple[Mesh, Mapping[str, tuple[str, ...]]] | None] = ContextVar("logical_sharding", default=None)


def active_mesh() -> tuple[Mesh, Mapping[str, tuple[str, ...]]] | None:
    """The mesh and the rules of the surrounding `use_mesh`, if there is one."""
    return _active.get()


def partition_spec(
    names: Sequence[str | None],
    shape: Sequence[int],
    mesh: Mesh,
    rules: Mapping[str, tuple[str, ...]] = RULES,
) -> PartitionSpec:
    """The mesh axes of one array.

    A mesh axis serves one dimension of an array, the first that asks for it; a dimension that the axes do not divide
    stays whole, so that odd widths are replicated instead of refused.

    Args:
        names: a logical name (or None) for each dimension.
        shape: the array's shape, as long as `names`.

    Raises:
        KeyError: a name that the table does not hold.
    """
    used: set[str] = set()
    spec: list[tuple[str, ...] | str | None] = []
    for name, size in zip(names, shape, strict=True):
        taken: list[str] = []
        for axis in rules[name] if name is not None else ():
            split = math.prod(mesh.shape[a] for a in [*taken, axis])
            if axis not in used and mesh.shape[axis] > 1 and size % split == 0:
                taken.append(axis)
        used.update(taken)
        spec.append(tuple(taken) if len(taken) > 1 else (taken[0] if taken else None))
    return PartitionSpec(*spec)


@contextmanager
def use_mesh(mesh: Mesh, rules: Mapping[str, tuple[str, ...]] = RULES) -> Iterator[None]:
    """Makes `constrain` effective for what is traced inside."""
    token = _active.set((mesh, rules))
    try:
        yield
    finally:
        _active.reset(token)


def constrain(x: jax.Array, *names: str | None) -> jax.Array:
    """Pins an activation to the mesh by its logical names; outside `use_mesh` it changes nothing."""
    active = _active.get()
    if active is None:
        return x
    mesh, rules = active
    return jax.lax.with_sharding_constraint(x, NamedSharding(mesh, partition_spec(names, x.shape, mesh, rules)))
