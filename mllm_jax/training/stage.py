"""A stage's compiled program: the loop runs it, and the planner only compiles it."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any

import jax
import optax
from flax import linen as nn
from jax.sharding import Mesh

from mllm_jax.data.batch import BatchSpec
from mllm_jax.layers.compute import with_compute
from mllm_jax.models.params import placed_params, shardings_of
from mllm_jax.sharding.mesh import batch_sharding
from mllm_jax.training.config import Experiment, Stage
from mllm_jax.training.flops import PartFlops, count_flops, flops_by_part
from mllm_jax.training.optimizer import learning_rate, make_optimizer
from mllm_jax.training.partition import Partition, num_bytes
from mllm_jax.training.step import (
    TrainState,
    init_state,
    make_apply,
    make_eval_step,
    make_train_step,
    state_shardings,
)
from mllm_jax.training.token_rows import signal_rows


@dataclass(frozen=True)
class StageProgram:
    """The compiled steps of a stage, and their arguments as ShapeDtypeStructs with shardings.

    Attributes:
        model: the model's config.
        partition: of the parameters into trained and frozen ones.
        optimizer: of the trained parameters.
        state: the arrays that a step changes.
        frozen: the other parameters, in the dtype in which the stage holds them.
        batch: a batch's arrays by name.
        step: (state, frozen, batch) -> (state, metrics), see `make_train_step`.
        eval_step: (params, frozen, batch) -> metrics.
    """

    stage: Stage
    model: Any
    partition: Partition
    mesh: Mesh
    optimizer: optax.GradientTransformation
    state: TrainState
    frozen: dict
    batch: dict[str, jax.ShapeDtypeStruct]
    step: Callable
    eval_step: Callable

    @property
    def sizes(self) -> dict[str, int]:
        """Bytes of all devices together, each array counted once."""
        return {
            "trainable_bytes": num_bytes(self.state.params),
            "frozen_bytes": num_bytes(self.frozen),
            "optimizer_bytes": num_bytes(self.state.opt_state),
        }

    def init(self, params: dict, key: jax.Array) -> TrainState:
        """Makes the state at step 0 from the trained parameters, which the first step donates."""
        return init_state(self.optimizer, params, shardings_of(self.state), key)

    def flops(self) -> int:
        """Counts the model FLOPs of one step over all devices, without recomputation by remat."""
        return count_flops(*self._gradient())

    def flops_by_part(self, parts: Collection[str]) -> dict[str, PartFlops]:
        """Counts them by part of the model, forward and backward; see `mllm_jax.training.flops.flops_by_part`."""
        function, *arguments = self._gradient()
        return flops_by_part(function, parts, *arguments)

    def _gradient(self):
        """Returns the loss's gradient without remat, and its arguments."""
        apply = make_apply(with_compute(self.model, remat="none").make())

        def loss(params, frozen, batch):
            return self.stage.objective.loss(apply, self.partition.join(params, frozen), batch, jax.random.key(0))

        arguments = (self.state.params, self.frozen, self.batch)
        plain = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), arguments)
        return jax.value_and_grad(loss, has_aux=True), *plain


def hold_frozen(stage: Stage, frozen: dict) -> dict:
    """Casts frozen parameters to the dtype in which a stage holds them."""
    dtype = stage.frozen_dtype
    return frozen if dtype is None else jax.tree.map(lambda x: x.astype(dtype), frozen)


def partition_of(stage: Stage, model: nn.Module, tokenizer: Any = None) -> Partition:
    """Returns the division of a stage's parameters.

    Args:
        tokenizer: the run's; None: a plan, which does not depend on the ids of signal tokens.
    """
    return Partition(stage.trainable, signal_rows(model, tokenizer) if stage.signal_tokens else None)


def build_stage(
    experiment: Experiment,
    index: int,
    mesh: Mesh,
    spec: BatchSpec,
    placed: dict | None = None,
    partition: Partition | None = None,
) -> StageProgram:
    """Builds a stage's program; nothing is computed or compiled.

    Args:
        spec: spec of a global batch.
        placed: all parameters of the stage's composition as ShapeDtypeStructs with shardings, if the caller has
            them.
        partition: of the parameters; None: as for a plan, see `partition_of`.

    Raises:
        ConfigError: a pattern of `trainable` that matches nothing.
    """
    stage, parts = experiment.stages[index], experiment.part_rules
    config = experiment.model_of(stage)
    model = config.make()
    placed = placed_params(model, mesh, parts) if placed is None else placed
    partition = partition_of(stage, model) if partition is None else partition
    trainable, frozen = partition.split(placed)
    optimizer = make_optimizer(stage.optimizer, stage.steps, stage.ema)
    schedule = learning_rate(stage.optimizer, stage.steps)
    layout = state_shardings(optimizer, trainable, shardings_of(trainable), mesh)
    state = TrainState(
        jax.ShapeDtypeStruct((), "int32"),
        trainable,
        jax.eval_shape(optimizer.init, trainable),
        jax.eval_shape(lambda: jax.random.key_data(jax.random.key(0))),
    )
    step = make_train_step(
        model,
        stage.objective,
        optimizer,
        schedule,
        mesh=mesh,
        parts=parts,
        shardings=layout,
        accumulate=stage.accumulate,
        joined=partition.join,
    )
    return StageProgram(
        stage,
        config,
        partition,
        mesh,
        optimizer,
        jax.tree.map(_placed, state, layout),
        jax.tree.map(lambda leaf: _placed(leaf, leaf.sharding, stage.frozen_dtype), frozen),
        {n: _placed(x, batch_sharding(mesh, len(x.shape), x.shape)) for n, x in spec.abstract().items()},
        step,
        make_eval_step(model, stage.objective, mesh=mesh, parts=parts, joined=partition.join),
    )


def _placed(leaf, sharding, dtype=None) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(leaf.shape, dtype or leaf.dtype, sharding=sharding)
