"""Logical axes: one table maps each named dimension to the mesh axes that it is split over.

Parameters and activations carry names (`batch`, `embed`, `heads`, ...). Only `RULES`, and `PARTS` for kinds of parts,
refer to the mesh. Changing the parallelism edits the tables, never a model.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass

import jax
from flax import linen as nn
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec

from mllm_jax.errors import ConfigError

AXES = ("data", "fsdp", "context", "tensor")

Table = Mapping[str, tuple[str, ...]]

RULES: Table = {
    "batch": ("data", "fsdp"),
    "seq": ("context",),
    "embed": ("fsdp",),
    "heads": ("tensor",),
    "kv_heads": ("tensor",),
    "head_dim": (),
    "mlp": ("tensor",),
    "vocab": ("tensor",),
    "layers": (),
    "slots": ("context",),
    "patches": (),
    "queries": (),
    "channels": (),
}

# By kind of part, for every modality but text. Images of one row are split over `context` like its text; if their
# number is not divisible, an encoder splits each image's patches instead. A projector reads few tokens an image and
# keeps them together.
_MEDIA = ("data", "fsdp", "context")
PARTS: Mapping[str, Table] = {
    "encoder": {"batch": _MEDIA, "patches": ("context",)},
    "projector": {"batch": _MEDIA, "seq": (), "patches": ()},
}

# Names of activations. A table of parameters with one of these names, such as position embeddings of patches, is looked
# up whole and never split along it.
ACTIVATIONS = ("batch", "seq", "slots", "patches")


@dataclass(frozen=True)
class PartRules:
    """Rules of one part of a model, for its parameters and its activations.

    Attributes:
        part: "encoder_image", "projector_image", "llm" or another part, as the model's parameters name it.
        axes: pairs (logical name, mesh axes); other names follow the general table.
    """

    part: str
    axes: tuple[tuple[str, tuple[str, ...]], ...]

    def __post_init__(self):
        names = [name for name, _ in self.axes]
        if unknown := sorted(set(names) - set(RULES)):
            raise ConfigError(
                f"rules of {self.part!r} for {', '.join(map(repr, unknown))}",
                f"logical names: {', '.join(RULES)}",
                "change the name",
            )
        for name, axes in self.axes:
            given = f"rules of {self.part!r}: {name!r} over {axes}"
            if isinstance(axes, str) or not set(axes) <= set(AXES) or len(set(axes)) != len(axes):
                raise ConfigError(given, f"a tuple of mesh axes, each once: {', '.join(AXES)}", "change the axes")
            if names.count(name) > 1:
                raise ConfigError(f"{given}, and once more", "each name once", "drop one of the two")


def data_parallel(part: str) -> PartRules:
    """Returns rules that split no matrix of a part over `tensor`, but rows or images over that axis as well.

    For an encoder beside a tensor-parallel LLM: an encoder of some hundred million parameters is too narrow to be split
    over `tensor`, and images need no communication between devices.
    """
    whole = (("heads", ()), ("kv_heads", ()), ("mlp", ()), ("vocab", ()))
    return PartRules(part, (("batch", ("data", "fsdp", "context", "tensor")), *whole))


@dataclass(frozen=True)
class _Active:
    mesh: Mesh
    rules: Table
    parts: Sequence[PartRules]


_active: ContextVar[_Active | None] = ContextVar("logical_sharding", default=None)
_part: ContextVar[str | None] = ContextVar("part_of_the_model", default=None)


def table_of_part(part: str | None, parts: Sequence[PartRules] = ()) -> Table:
    """Returns the rules of a part such as encoder_image: those of its kind in `PARTS`, overridden by `parts`."""
    kind, _, modality = (part or "").rpartition("_")
    own = dict(PARTS.get(kind, {})) if modality not in ("", "text") else {}
    for rules in parts:
        own |= dict(rules.axes) if rules.part == part else {}
    return own


def active_mesh() -> tuple[Mesh, Table] | None:
    """Returns the mesh of the surrounding `use_mesh`, if any, and the rules of the part that is being traced."""
    active = _active.get()
    if active is None:
        return None
    return active.mesh, {**active.rules, **table_of_part(_part.get(), active.parts)}


def partition_spec(
    names: Sequence[str | None],
    shape: Sequence[int],
    mesh: Mesh | AbstractMesh,
    rules: Table = RULES,
) -> PartitionSpec:
    """Returns the mesh axes of one array.

    A mesh axis splits one dimension of an array, the first that names it. A dimension that the axes do not divide stays
    whole, so that odd widths are replicated instead of refused.

    Args:
        names: a logical name (or None) for each dimension.
        shape: the array's shape, as long as `names`.

    Raises:
        KeyError: a name that is not in the table.
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


def split_sizes(names: Sequence[str | None], shape: Sequence[int]) -> list[int]:
    """Returns the number of pieces that the surrounding `use_mesh` splits each dimension into; 1 outside of it."""
    active = active_mesh()
    if active is None:
        return [1] * len(shape)
    return [
        math.prod(active[0].shape[axis] for axis in axes_of(entry)) for entry in partition_spec(names, shape, *active)
    ]


def axes_of(entry: tuple[str, ...] | str | None) -> tuple[str, ...]:
    """Returns an entry of a PartitionSpec as a tuple."""
    return () if entry is None else (entry,) if isinstance(entry, str) else tuple(entry)


@contextmanager
def use_mesh(mesh: Mesh, rules: Table = RULES, parts: Sequence[PartRules] = ()) -> Iterator[None]:
    """Makes `constrain` effective for what is traced inside, by the rules of the surrounding part of the model.

    A part is a submodule with a part's name: its methods are traced under its rules.
    """
    token = _active.set(_Active(mesh, rules, tuple(parts)))
    try:
        with nn.intercept_methods(_enter_part):
            yield
    finally:
        _active.reset(token)


@contextmanager
def part_of_model(name: str | None) -> Iterator[None]:
    """Assigns what is traced inside to this part, for computations of a part outside of its module."""
    token = _part.set(name)
    try:
        yield
    finally:
        _part.reset(token)


def _enter_part(method, args, kwargs, context):
    scope = context.module.scope
    if scope is None or len(scope.path) != 1:
        return method(*args, **kwargs)
    with part_of_model(scope.path[0]):
        return method(*args, **kwargs)


def constrain(x: jax.Array, *names: str | None) -> jax.Array:
    """Constrains an activation's sharding by its logical names; outside `use_mesh` it changes nothing."""
    active = active_mesh()
    if active is None:
        return x
    mesh, rules = active
    return jax.lax.with_sharding_constraint(x, NamedSharding(mesh, partition_spec(names, x.shape, mesh, rules)))
