"""The compiled functions of generation: read prompts, read more prompts into free rows, add tokens to every row."""

from __future__ import annotations

import copy
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from flax import struct
from jax.sharding import Mesh

from mllm_jax.generation.beam import beam_search
from mllm_jax.generation.decode_step import Steps, on_mesh, steps_of
from mllm_jax.generation.sampling import Sampling, choose, row_keys, seen_tokens
from mllm_jax.sharding.logical import constrain
from mllm_jax.sharding.mesh import batch_sharding

BUCKET = 32


def bucket(length: int, most: int | None = None, *, least: int = BUCKET) -> int:
    """Returns the padded length of a row of `length`: 32, 48, 64, 96, 128, 192, ..., two sizes per doubling.

    Args:
        most: the largest size.
        least: the smallest size, a power of two.
    """
    power = max(least, 1 << max(length - 1, 0).bit_length())
    between = power * 3 // 4
    padded = between if least <= between and length <= between else power
    return padded if most is None else min(padded, most)


def placed(array: np.ndarray, mesh: Mesh | None) -> jax.Array:
    """Puts an array of rows on the devices."""
    return jnp.asarray(array) if mesh is None else jax.device_put(array, batch_sharding(mesh, array.ndim, array.shape))


def placed_batch(tree: Any, mesh: Mesh | None) -> Any:
    """Puts arrays of rows on the devices."""
    return jax.tree.map(lambda array: placed(array, mesh), tree)


@struct.dataclass
class Asked:
    """The request of each row.

    seeds, indices: int32[B], see `row_keys`.  limits: int32[B] tokens that a row may add; one with 0 is not answered.
    stops: int32[B, n] end tokens, the rest negative.
    """

    seeds: jax.Array
    indices: jax.Array
    limits: jax.Array
    stops: jax.Array


@struct.dataclass
class Rows:
    """The answers in progress.

    tokens: int32[B, N].  counts: int32[B] tokens of each row with its end token.  ended: bool[B].
    seen: bool[B, V] or None, for the repetition penalty.  logprobs: float32[B, N] or None.
    """

    asked: Asked
    tokens: jax.Array
    counts: jax.Array
    ended: jax.Array
    seen: jax.Array | None
    logprobs: jax.Array | None


class Program:
    """A model's compiled functions, compiled once for each shape: rows, and buckets of lengths.

    Their first argument is the parameters. Each call donates the model's state and writes it in place.

    Args:
        module: see `steps_of`.
        params: its parameters, unboxed; sharded if there is a mesh. None: `of` gives them.
        by_layer: see `LanguageSteps`.
    """

    def __init__(
        self, module: nn.Module, params: dict | None, mesh: Mesh | None = None, *, by_layer: bool | None = None
    ):
        self.steps: Steps = steps_of(module, by_layer)
        self.params, self.mesh = params if params is None else self.steps.prepare(params), mesh
        sizes = ("room", "new", "sampling", "logprobs")
        self.start = jax.jit(self._start, static_argnames=(*sizes, "rows"))
        self.refill = jax.jit(self._refill, static_argnames=sizes, donate_argnames="state")
        self.advance = jax.jit(self._advance, static_argnames="sampling", donate_argnames="state")
        sizes = ("room", "new", "beams", "num_stops", "repetition_penalty")
        self.search = jax.jit(partial(beam_search, self.steps, mesh), static_argnames=sizes)

    def of(self, params: dict) -> Program:
        """Returns the same program with other parameters; both share the compiled functions."""
        other = copy.copy(self)
        other.params = self.steps.prepare(params)
        return other

    def place(self, tree: Any) -> Any:
        """Puts arrays of rows on the devices."""
        return placed_batch(tree, self.mesh)

    def _start(self, params, batch, asked, *, rows, room, new, sampling, logprobs=False):
        """Reads prompts and adds each answer's first token; the rows after them, up to `rows`, are free.

        Args:
            room: positions of a row in the model's cache.
            new: the most tokens of an answer.

        Returns:
            The state, and Rows.
        """
        with on_mesh(self.mesh):
            logits, state = self.steps.prefill(params, batch, room)
            read, vocab_size = logits.shape
            begun = Rows(
                asked=asked,
                tokens=jnp.zeros((read, new), jnp.int32),
                counts=jnp.zeros((read,), jnp.int32),
                ended=asked.limits <= 0,
                seen=seen_tokens(*self.steps.said(batch), vocab_size) if sampling.repetition_penalty != 1 else None,
                logprobs=jnp.zeros((read, new), jnp.float32) if logprobs else None,
            )
            begun = _add(begun, logits, _keys(asked, sampling), sampling)
            if rows == read:
                return state, begun
            index = jnp.minimum(jnp.arange(rows), read - 1)
            begun = jax.tree.map(lambda leaf: leaf[index], begun)
            begun = begun.replace(ended=begun.ended | (jnp.arange(rows) >= read))
            return self.steps.take(state, index), _split_over_mesh(begun)

    def _refill(self, params, state, rows, batch, asked, places, **sizes):
        """Reads prompt i into row places[i] as `_start` does; a prompt with a place past the end is dropped."""
        read, begun = self._start(params, batch, asked, rows=len(places), **sizes)
        with on_mesh(self.mesh):
            rows = jax.tree.map(lambda held, new: held.at[places].set(new, mode="drop"), rows, begun)
            return self.steps.put(state, read, places), _split_over_mesh(rows)

    def _advance(self, params, state, rows, most, least, *, sampling):
        """Adds up to `most` tokens to each row, while more than `least` rows continue.

        Returns:
            The state, Rows, and the number of decode steps.
        """
        keys = _keys(rows.asked, sampling)

        def going(carry):
            step, _, rows = carry
            return (step < most) & ((~rows.ended).sum() > least)

        def body(carry):
            step, state, rows = carry
            last = jnp.take_along_axis(rows.tokens, jnp.maximum(rows.counts - 1, 0)[:, None], axis=1)[:, 0]
            logits, state = self.steps.step(params, state, last)
            return step + 1, state, _add(rows, logits, keys, sampling)

        with on_mesh(self.mesh):
            steps, state, rows = jax.lax.while_loop(going, body, (jnp.int32(0), state, rows))
        return state, rows, steps


def _keys(asked: Asked, sampling: Sampling) -> jax.Array | None:
    return row_keys(asked.seeds, asked.indices) if sampling.temperature > 0 else None


def _add(rows: Rows, logits: jax.Array, keys: jax.Array | None, sampling: Sampling) -> Rows:
    """Adds the next token of each row that has not ended."""
    token = choose(logits, keys, rows.counts, sampling, rows.seen)
    each = jnp.arange(len(token))
    place = jnp.where(rows.ended, rows.tokens.shape[1], rows.counts)  # past the end, where writes are dropped
    counts = rows.counts + ~rows.ended
    logprobs, seen = rows.logprobs, rows.seen
    if logprobs is not None:
        chosen = jnp.take_along_axis(jax.nn.log_softmax(logits), token[:, None], axis=1)[:, 0]
        logprobs = logprobs.at[each, place].set(chosen, mode="drop")
    if seen is not None:
        seen = seen.at[each, token].set(True)
    added = rows.replace(
        tokens=rows.tokens.at[each, place].set(token, mode="drop"),
        counts=counts,
        ended=rows.ended | (token[:, None] == rows.asked.stops).any(axis=1) | (counts >= rows.asked.limits),
        seen=seen,
        logprobs=logprobs,
    )
    return _split_over_mesh(added)


def _split_over_mesh(rows: Rows) -> Rows:
    """Shards rows as a batch's rows, whichever function made them: another sharding would compile the next again."""
    return jax.tree.map(lambda leaf: constrain(leaf, "batch", *(None,) * (leaf.ndim - 1)), rows)
