"""The trainable and the frozen parameters of a stage: two trees that add up to the whole."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Any

import jax
from flax.traverse_util import flatten_dict, unflatten_dict

from mllm_jax.errors import ConfigError
from mllm_jax.models.part_names import new_names

if TYPE_CHECKING:
    from mllm_jax.training.token_rows import TokenRows

Leaves = dict[str, Any]  # path -> leaf


@dataclass(frozen=True)
class Partition:
    """The division of a stage's parameters.

    Attributes:
        patterns: of `Stage.trainable`.
        rows: of signal tokens that train although their tables are frozen; None: there are none.
    """

    patterns: tuple[str, ...]
    rows: TokenRows | None = None

    def split(self, params: dict) -> tuple[dict, dict]:
        """Returns (trainable, frozen) nested dicts of arrays, or of ShapeDtypeStructs with shardings.

        Raises:
            ConfigError: a pattern that matches nothing, or that matches a table whose rows alone should train.
        """
        trees = split(params, self.patterns)
        if self.rows is None:
            return trees
        trainable, frozen = self.rows.split(*(flatten_dict(tree, sep="/") for tree in trees))
        return unflatten_dict(trainable, sep="/"), unflatten_dict(frozen, sep="/")

    def join(self, trainable: dict, frozen: dict) -> dict:
        """Returns the parameters with which the model is applied."""
        whole = join(trainable, frozen)
        if self.rows is None:
            return whole
        return unflatten_dict(self.rows.join(flatten_dict(whole, sep="/")), sep="/")

    def trained(self, trainable: dict, params: dict) -> dict:
        """Returns the leaves of `params` that a stage has changed, as it leaves them."""
        if self.rows is None:
            return trainable
        leaves = self.rows.trained(flatten_dict(trainable, sep="/"), flatten_dict(params, sep="/"))
        return unflatten_dict(leaves, sep="/")


def split(params: dict, patterns: Sequence[str]) -> tuple[dict, dict]:
    """Returns (trainable, frozen) nested dicts; a leaf is trainable if a pattern matches its path.

    Raises:
        ConfigError: a pattern that matches nothing.
    """
    flat = flatten_dict(params, sep="/")
    for pattern in patterns:
        if not any(fnmatchcase(path, pattern) for path in flat):
            tops = sorted({"/".join(path.split("/")[:2]) for path in flat})
            raise ConfigError(
                f"trainable pattern {pattern!r} matches no parameter",
                f"paths such as {tops}",
                f"change it{new_names([pattern])}",
            )
    chosen = {path for path in flat if any(fnmatchcase(path, pattern) for pattern in patterns)}
    trainable = {path: leaf for path, leaf in flat.items() if path in chosen}
    frozen = {path: leaf for path, leaf in flat.items() if path not in chosen}
    return unflatten_dict(trainable, sep="/"), unflatten_dict(frozen, sep="/")


def trains(patterns: Sequence[str], part: str) -> bool:
    """Returns whether a pattern matches parameters of a part of the model, by its name alone."""
    return any(pattern.startswith(part) or fnmatchcase(f"{part}/x", pattern) for pattern in patterns)


def join(*trees: dict) -> dict:
    """Joins trees; the inverse of `split`."""
    flat: dict = {}
    for tree in trees:
        flat |= flatten_dict(tree, sep="/")
    return unflatten_dict(flat, sep="/")


def num_bytes(tree) -> int:
    """Returns the bytes of all arrays of a tree, each counted once, whatever the sharding."""
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def num_parameters(tree) -> int:
    return sum(leaf.size for leaf in jax.tree.leaves(tree))
