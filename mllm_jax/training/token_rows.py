"""Signal tokens that train alone: their rows in the LLM's embedding and head, with all other rows frozen.

The rows of a frozen table are trainable parameters of their own, beside it:

    llm/token_embedding/embedding        float32[V, E]  frozen
    llm/token_embedding/new_embedding    float32[n, E]  trainable

A step puts the rows into a copy of the table. No gradient, decay, momentum or rounding reaches another row, and the
optimizer's state is that of n rows. The backward pass still computes the gradient of the whole table.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jax.sharding import NamedSharding, PartitionSpec

from mllm_jax.data.processing.signals import ids_of
from mllm_jax.errors import ConfigError
from mllm_jax.models.output import names_of_signals
from mllm_jax.models.part_sources import vocabulary_axes
from mllm_jax.training.partition import Leaves

_NEW = "new_"  # prefix of the name of trainable rows


@dataclass(frozen=True)
class TokenRows:
    """The rows of some tokens.

    Attributes:
        ids: of the tokens.
        axes: {path of a table: axis of its tokens}.
    """

    ids: tuple[int, ...]
    axes: Mapping[str, int]

    def split(self, trainable: Leaves, frozen: Leaves) -> tuple[Leaves, Leaves]:
        """Adds the rows to the trainable leaves: arrays, or ShapeDtypeStructs with shardings.

        Raises:
            ConfigError: a table is trainable itself.
        """
        if whole := sorted(self.axes.keys() & trainable.keys()):
            raise ConfigError(
                f"signal_tokens and a pattern of `trainable` that matches {whole[0]}, which then trains with all rows",
                "either the rows of signal tokens, or whole tables",
                "leave out signal_tokens, or narrow the pattern, as to 'llm/layers/*'",
            )
        return trainable | {_rows(path): self._cut(frozen[path], axis) for path, axis in self.axes.items()}, frozen

    def join(self, leaves: Leaves) -> Leaves:
        """Puts the rows of a step's leaves into copies of their tables, in the rows' dtype."""
        rows = {path: leaves[_rows(path)] for path in self.axes}
        tables = {path: self._put(leaves[path], each, self.axes[path]) for path, each in rows.items()}
        return {path: leaf for path, leaf in leaves.items() if path not in map(_rows, rows)} | tables

    def trained(self, trainable: Leaves, params: Leaves) -> Leaves:
        """Returns the trained leaves with whole tables instead of rows, under the shardings of `params`."""
        rows = {_rows(path): path for path in self.axes}
        found = {path: leaf for path, leaf in trainable.items() if path not in rows}
        for name, path in rows.items():
            put = jax.jit(
                lambda table, x, axis=self.axes[path]: self._put(table, x, axis), out_shardings=params[path].sharding
            )
            found[path] = put(params[path], trainable[name])
        return found

    def _cut(self, table: Any, axis: int) -> Any:
        shape = (*table.shape[:axis], len(self.ids), *table.shape[axis + 1 :])
        spec = [*table.sharding.spec, *[None] * len(shape)][: len(shape)]
        spec[axis] = None
        sharding = NamedSharding(table.sharding.mesh, PartitionSpec(*spec))
        if isinstance(table, jax.ShapeDtypeStruct):
            return jax.ShapeDtypeStruct(shape, table.dtype, sharding=sharding)
        ids = np.asarray(self.ids)
        return jax.jit(lambda x: jnp.take(x, ids, axis=axis), out_shardings=sharding)(table)

    def _put(self, table: jax.Array, rows: jax.Array, axis: int) -> jax.Array:
        where = (slice(None),) * axis + (np.asarray(self.ids),)
        return table.astype(rows.dtype).at[where].set(rows, unique_indices=True)


def signal_rows(model: nn.Module, tokenizer: Any = None) -> TokenRows:
    """Returns the rows of the tokens with which a model produces media.

    Args:
        tokenizer: None: the last ids of the vocabulary, which suffice for a plan.
    """
    config = model.config
    names = [name for each in names_of_signals(config).values() for name in each]
    size = config.llm.vocab_size
    ids = range(size - len(names), size) if tokenizer is None else ids_of(tokenizer, names, "the stage's signal_tokens")
    return TokenRows(tuple(ids), {f"llm/{path}": axis for path, axis in vocabulary_axes(config.llm).items()})


def _rows(path: str) -> str:
    """Returns the path of the rows of a table; the optimizer knows a matrix by the end of its name."""
    folder, _, name = path.rpartition("/")
    return f"{folder}/{_NEW}{name}"
