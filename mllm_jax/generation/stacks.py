"""Layers one by one instead of stacked: what makes decoding fast on a CPU.

Layers are trained as one scanned stack. A loop that decodes a token at a time would copy each layer's slice of the
parameters, and the whole cache, at every step: there are no dot products of slices on a CPU, and a scan's inputs and
outputs share no memory. So parameters and cache are kept apart, layer by layer, outside the compiled function, are
stacked inside it, and the module unrolls its layers: XLA sees a slice of a concatenation, which is one of its parts,
and neither is ever made.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

STACK = "layers"  # the end of a scanned stack's name among the parameters


def unrolled(config: Any) -> Any | None:
    """The config of the same module with its scan over layers unrolled; None if it has no switch for that."""
    if not hasattr(config, "scan_unroll"):
        return None
    names = [f.name for f in dataclasses.fields(config) if f.name.startswith("num_") and f.name.endswith("layers")]
    changes = {"scan_unroll": max(getattr(config, name) for name in names)}
    return dataclasses.replace(config, **changes, **({"remat": "none"} if hasattr(config, "remat") else {}))


def unstack(params: dict) -> dict:
    """Parameters with each stack of layers as a tuple of layers; a copy, sharded as the stack was."""
    return {
        name: _layers(value) if name.endswith(STACK) else unstack(value) if isinstance(value, dict) else value
        for name, value in params.items()
    }


@jax.jit
def _layers(stack: dict) -> tuple[dict, ...]:
    flat, structure = jax.tree.flatten(stack)
    return tuple(jax.tree.unflatten(structure, layer) for layer in zip(*map(tuple, flat), strict=True))


def restack(tree: Any) -> Any:
    """Undoes `unstack`; inside a compiled function whose layers are unrolled it costs nothing."""
    if isinstance(tree, tuple):
        return jax.tree.map(lambda *layers: jnp.stack(layers), *map(restack, tree))
    return {name: restack(value) for name, value in tree.items()} if isinstance(tree, dict) else tree


@dataclass(frozen=True)
class CacheLayout:
    """Where the rows of a cache lie, found out by making one with more rows.

    Attributes:
        axes: for each leaf the axis of the rows; None for a leaf without rows. A leaf whose rows are on axis 1 has
            layers on axis 0.
    """

    structure: jax.tree_util.PyTreeDef
    axes: tuple[int | None, ...]

    @classmethod
    def of(cls, make_cache: Callable[[int], Any]) -> CacheLayout:
        """`make_cache(batch)` -> a cache; it is only traced."""
        few, more = (jax.tree.flatten(jax.eval_shape(lambda rows=rows: make_cache(rows))) for rows in (2, 3))
        axes = (
            next((axis for axis, (a, b) in enumerate(zip(x.shape, y.shape, strict=True)) if a != b), None)
            for x, y in zip(few[0], more[0], strict=True)
        )
        return cls(few[1], tuple(axes))

    def split(self, cache: Any) -> tuple:
        """The cache's leaves, each stack of layers as a tuple of layers."""
        leaves = zip(jax.tree.leaves(cache), self.axes, strict=True)
        return tuple(tuple(leaf) if axis == 1 else leaf for leaf, axis in leaves)

    def join(self, parts: tuple) -> Any:
        """Undoes `split`."""
        return jax.tree.unflatten(self.structure, [jnp.stack(p) if isinstance(p, tuple) else p for p in parts])

    def take(self, cache: Any, rows: jax.Array) -> Any:
        """The cache with row rows[i] in row i."""
        leaves = zip(jax.tree.leaves(cache), self.axes, strict=True)
        taken = [leaf if axis is None else jnp.take(leaf, rows, axis=axis) for leaf, axis in leaves]
        return jax.tree.unflatten(self.structure, taken)
