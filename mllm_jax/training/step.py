"""The train step: objective -> gradient of the trainable parameters -> optimizer, jitted, donated and sharded."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import jax
import jax.numpy as jnp
import optax
from flax import linen as nn
from flax import struct
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from mllm_jax.data.batch import BatchSpec
from mllm_jax.sharding.logical import PartRules, use_mesh
from mllm_jax.sharding.mesh import batch_sharding
from mllm_jax.training.average import averaged
from mllm_jax.training.partition import join


@struct.dataclass
class TrainState:
    """State that a step changes: step int32, trainable parameters, optimizer state, PRNG key (raw uint32 data)."""

    step: jax.Array
    params: dict
    opt_state: optax.OptState
    key: jax.Array

    @property
    def result(self) -> dict:
        """The trained parameters that are evaluated and kept: their moving average, if the stage has one."""
        return averaged(self.params, self.opt_state)


def state_shardings(optimizer: optax.GradientTransformation, params, shardings, mesh: Mesh) -> TrainState:
    """Returns the shardings of a TrainState: the optimizer's moments have those of their parameters."""
    replicated = NamedSharding(mesh, PartitionSpec())
    opt_state = optax.tree_map_params(
        optimizer,
        lambda _, sharding: sharding,
        jax.eval_shape(optimizer.init, params),
        shardings,
        transform_non_params=lambda _: replicated,
    )
    return TrainState(replicated, shardings, opt_state, replicated)


def init_state(optimizer, params, shardings: TrainState, key: jax.Array) -> TrainState:
    """Makes the state at step 0 of a stage."""
    opt_state = jax.jit(optimizer.init, out_shardings=shardings.opt_state)(params)
    place = partial(jax.device_put, device=shardings.step)
    return TrainState(place(jnp.int32(0)), params, opt_state, place(jax.random.key_data(key)))


def make_apply(model: nn.Module) -> Callable:
    """Returns apply(params, batch, method=None), through which objectives call the model."""

    def apply(params, batch, method=None):
        return model.apply({"params": params}, batch, method=method)

    return apply


def make_train_step(
    model: nn.Module,
    objective,
    optimizer,
    schedule,
    *,
    mesh: Mesh,
    shardings: TrainState,
    accumulate=1,
    parts=(),
    joined: Callable = join,
):
    """Compiles (state, frozen, batch) -> (state, metrics).

    A loss or gradient that is not finite is never applied: parameters and optimizer state stay, the step counts on,
    and the metric `nonfinite` is 1.

    Args:
        batch: arrays [rows, ...]; `accumulate` > 1 cuts the rows into that number of pieces, whose gradients are
            averaged by the objective's `weight`, so that the result is that of the whole batch. (A contrastive piece
            has only its own negatives.)
        parts: rules for single parts of the model in the table of logical axes.
        joined: (trainable, frozen) -> all parameters, see `Partition.join`.
    """
    apply = make_apply(model)

    def loss(params, frozen, batch, key):
        return objective.loss(apply, joined(params, frozen), batch, key)

    gradient = _in_pieces(jax.value_and_grad(loss, has_aux=True), accumulate, mesh)

    def step(state: TrainState, frozen, batch):
        with use_mesh(mesh, parts=parts):
            key = jax.random.fold_in(jax.random.wrap_key_data(state.key), state.step)
            value, metrics, grads = gradient(state.params, frozen, batch, key)
            norm = optax.tree.norm(grads)
            finite = jnp.isfinite(value) & jnp.isfinite(norm)
            updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
            params = optax.apply_updates(state.params, updates)
            params, opt_state = jax.tree.map(
                lambda new, old: jnp.where(finite, new, old), (params, opt_state), (state.params, state.opt_state)
            )
            metrics |= {
                "loss": value,
                "grad_norm": norm,
                "learning_rate": schedule(state.step),
                "nonfinite": 1.0 - finite.astype(jnp.float32),
            }
            return state.replace(step=state.step + 1, params=params, opt_state=opt_state), metrics

    replicated = NamedSharding(mesh, PartitionSpec())
    return jax.jit(step, donate_argnums=0, out_shardings=(shardings, replicated))


def _in_pieces(gradient: Callable, pieces: int, mesh: Mesh) -> Callable:
    """Returns a function of the loss, metrics and gradient of a whole batch, piece by piece; see `make_train_step`."""

    def whole(params, frozen, batch, key):
        (value, metrics), grads = gradient(params, frozen, batch, key)
        return value, metrics, grads

    def cut(x):
        """Reshapes [rows, ...] to [pieces, rows/pieces, ...]; neighbors go to different pieces, so shards keep rows."""
        x = x.reshape(x.shape[0] // pieces, pieces, *x.shape[1:]).swapaxes(0, 1)
        spec = batch_sharding(mesh, x.ndim - 1, x.shape[1:]).spec
        return jax.lax.with_sharding_constraint(x, NamedSharding(mesh, PartitionSpec(None, *spec)))

    def summed(params, frozen, batch, key):
        def body(total, piece):
            (value, metrics), grads = gradient(params, frozen, piece, key)
            weight = metrics["weight"]
            scaled = jax.tree.map(lambda x: x * weight, (value, metrics, grads))
            return jax.tree.map(jnp.add, total, scaled), weight

        cut_batch = jax.tree.map(cut, batch)
        first = jax.tree.map(lambda x: x[0], cut_batch)
        shapes = jax.eval_shape(gradient, params, frozen, first, key)
        zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), (*shapes[0], shapes[1]))
        (value, metrics, grads), weights = jax.lax.scan(body, zeros, cut_batch)
        count = jnp.maximum(weights.sum(), 1e-9)
        value, metrics, grads = jax.tree.map(lambda x: x / count, (value, metrics, grads))
        return value, metrics | {"weight": weights.sum()}, grads

    return whole if pieces == 1 else summed


def make_eval_step(
    model: nn.Module, objective, *, mesh: Mesh, parts: Sequence[PartRules] = (), joined: Callable = join
):
    """Compiles (params, frozen, batch) -> metrics with the loss, without gradient."""
    apply = make_apply(model)

    def step(params, frozen, batch):
        with use_mesh(mesh, parts=parts):
            value, metrics = objective.loss(apply, joined(params, frozen), batch, jax.random.key(0))
            return metrics | {"loss": value}

    return jax.jit(step, out_shardings=NamedSharding(mesh, PartitionSpec()))


def place_batch(local: dict, mesh: Mesh, spec: BatchSpec, rows: list[int]) -> dict:
    """Makes global arrays from this process's rows, whose indices are `rows`; no data moves between hosts."""
    spec.check(local)
    position = {row: i for i, row in enumerate(rows)}

    def one(name, array):
        shape = spec[name].shape

        def piece(index):
            wanted = range(*index[0].indices(shape[0]))
            start = position[wanted[0]]
            return array[(slice(start, start + len(wanted)), *index[1:])]

        return jax.make_array_from_callback(shape, batch_sharding(mesh, len(shape), shape), piece)

    return {name: one(name, array) for name, array in local.items()}


def local_rows(mesh: Mesh, rows: int) -> list[int]:
    """Returns the indices of a global batch's rows that this process's devices hold, in order."""
    indices = batch_sharding(mesh, 1, (rows,)).addressable_devices_indices_map((rows,))
    return sorted({row for (piece,) in indices.values() for row in range(*piece.indices(rows))})
