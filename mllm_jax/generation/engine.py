"""The compiled part of generation: one function reads the prompts, one adds tokens until every row has ended."""

from __future__ import annotations

import copy
import dataclasses
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from flax import struct
from jax.sharding import Mesh

from mllm_jax.generation.decode_step import Batch, Steps, steps_of
from mllm_jax.generation.sampling import Sampling, choose, row_keys
from mllm_jax.sharding.logical import use_mesh
from mllm_jax.sharding.mesh import batch_sharding

BUCKET = 32
STOPS = 8  # end tokens are padded to a multiple of this with NO_TOKEN
NO_TOKEN = -1


def bucket(length: int) -> int:
    """The length that a row of `length` is padded to: at most 32 or a quarter longer, four sizes a doubling."""
    width = max(BUCKET, 1 << max((length - 1).bit_length() - 3, 0))
    return max(1, -(-length // width)) * width


def placed(array: np.ndarray, mesh: Mesh | None) -> jax.Array:
    """An array of rows on the devices."""
    return jnp.asarray(array) if mesh is None else jax.device_put(array, batch_sharding(mesh, array.ndim, array.shape))


def on_mesh(mesh: Mesh | None) -> AbstractContextManager:
    """Makes activations follow the mesh, if there is one."""
    return nullcontext() if mesh is None else use_mesh(mesh)


@struct.dataclass
class Rows:
    """What does not change while a batch is answered.

    keys: key[B], None when greedy.  limits: int32[B] tokens that a row may add.  stops: int32[n] end tokens.
    """

    keys: jax.Array | None
    limits: jax.Array
    stops: jax.Array


@struct.dataclass
class Progress:
    """A batch that is being answered.

    state: the model's.  step: int32, tokens added to every row that has not ended.  tokens: int32[B, N].
    counts: int32[B] tokens of each row, its end token counted in.  ended: bool[B].
    seen: bool[B, V] or None, for the repetition penalty.  logprobs: float32[B, N] or None.
    """

    state: Any
    step: jax.Array
    tokens: jax.Array
    counts: jax.Array
    ended: jax.Array
    seen: jax.Array | None
    logprobs: jax.Array | None


class Engine:
    """Prompts in, tokens out. What is compiled is compiled once for each shape: rows, and buckets of lengths.

    Args:
        module: see `steps_of`.
        params: its parameters, unboxed; sharded if there is a mesh. None: they come with `of`.
        by_layer: see `LanguageSteps`.
    """

    def __init__(
        self, module: nn.Module, params: dict | None, mesh: Mesh | None = None, *, by_layer: bool | None = None
    ):
        self.steps: Steps = steps_of(module, by_layer)
        self.params, self.mesh = params if params is None else self.steps.prepare(params), mesh
        # Each call gives its cache to the next, which writes it in place; what the host looks at is not given away.
        self._start = jax.jit(self._start_impl, static_argnames=("new", "sampling", "logprobs"))
        self._advance = jax.jit(self._advance_impl, static_argnames=("sampling",), donate_argnames=("state",))

    def of(self, params: dict) -> Engine:
        """The same engine with other parameters; what is compiled serves both."""
        other = copy.copy(self)
        other.params = self.steps.prepare(params)
        return other

    def place(self, array: np.ndarray) -> jax.Array:
        """An array of rows on the devices."""
        return placed(array, self.mesh)

    def rows(self, limits: np.ndarray, indices: np.ndarray, stops: tuple[int, ...], sampling: Sampling) -> Rows:
        """
        Args:
            limits: int[B]; a row with 0 is not answered.
            indices: int[B] each prompt's place in the caller's list.
        """
        padded = np.full(-(-max(len(stops), 1) // STOPS) * STOPS, NO_TOKEN, np.int32)
        padded[: len(stops)] = stops
        keys = row_keys(sampling.seed, jnp.asarray(indices)) if sampling.temperature > 0 else None
        return Rows(keys, self.place(limits.astype(np.int32)), jnp.asarray(padded))

    def start(self, batch: Batch, rows: Rows, new: int, sampling: Sampling, logprobs: bool = False) -> Progress:
        """Reads the prompts and adds each answer's first token; there is room for `new` (a bucket)."""
        return self._start(self.params, batch, rows, new=new, sampling=_without_seed(sampling), logprobs=logprobs)

    def advance(self, progress: Progress, rows: Rows, until: int, sampling: Sampling) -> Progress:
        """Adds tokens until every row has ended or has `until` of them; the state in `progress` is used up."""
        rest = progress.replace(state=None)
        return self._advance(self.params, progress.state, rest, rows, np.int32(until), sampling=_without_seed(sampling))

    def context(self):
        """Makes activations follow the mesh, if there is one."""
        return on_mesh(self.mesh)

    def seen(self, batch: Batch, logits: jax.Array, sampling: Sampling) -> jax.Array | None:
        """bool[B, V]: the tokens that a repetition penalty finds said already; None without one."""
        if sampling.repetition_penalty == 1:
            return None
        tokens, said = self.steps.said(batch)
        # What was not said goes to a place that does not exist.
        place = jnp.where(said, tokens, logits.shape[1])
        return jnp.zeros(logits.shape, bool).at[jnp.arange(len(place))[:, None], place].set(True, mode="drop")

    def _start_impl(self, params, batch, rows, *, new, sampling, logprobs):
        with self.context():
            logits, state = self.steps.prefill(params, batch, new)
            count = logits.shape[0]
            progress = Progress(
                state=state,
                step=jnp.int32(0),
                tokens=jnp.zeros((count, new), jnp.int32),
                counts=jnp.zeros((count,), jnp.int32),
                ended=rows.limits <= 0,
                seen=self.seen(batch, logits, sampling),
                logprobs=jnp.zeros((count, new), jnp.float32) if logprobs else None,
            )
            return _add(progress, logits, rows, sampling)

    def _advance_impl(self, params, state, progress, rows, until, *, sampling):
        def going(progress):
            return (progress.step < until) & ~progress.ended.all()

        def body(progress):
            last = jax.lax.dynamic_slice_in_dim(progress.tokens, progress.step - 1, 1, axis=1)[:, 0]
            logits, state = self.steps.step(params, progress.state, last)
            return _add(progress.replace(state=state), logits, rows, sampling)

        with self.context():
            return jax.lax.while_loop(going, body, progress.replace(state=state))


def _add(progress: Progress, logits: jax.Array, rows: Rows, sampling: Sampling) -> Progress:
    """The next token of each row; rows that have ended write tokens too, behind their count."""
    p = progress
    token = choose(logits, rows.keys, p.step, sampling, p.seen)
    counts = p.counts + ~p.ended
    logprobs, seen = p.logprobs, p.seen
    if logprobs is not None:
        chosen = jnp.take_along_axis(jax.nn.log_softmax(logits), token[:, None], axis=1)
        logprobs = jax.lax.dynamic_update_slice_in_dim(logprobs, chosen, p.step, axis=1)
    if seen is not None:
        seen = seen.at[jnp.arange(len(token)), token].set(True)
    return p.replace(
        step=p.step + 1,
        tokens=jax.lax.dynamic_update_slice_in_dim(p.tokens, token[:, None], p.step, axis=1),
        counts=counts,
        ended=p.ended | (token[:, None] == rows.stops).any(axis=1) | (counts >= rows.limits),
        seen=seen,
        logprobs=logprobs,
    )


def _without_seed(sampling: Sampling) -> Sampling:
    """The seed is in the keys: another seed must not compile again."""
    return dataclasses.replace(sampling, seed=0)
