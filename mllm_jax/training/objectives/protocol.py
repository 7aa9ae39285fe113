"""The protocol of objectives: a loss, and a check of the models and stages that it can train."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

if TYPE_CHECKING:
    from mllm_jax.training.config import Stage


@runtime_checkable
class Objective(Protocol):
    """Interface of `Stage.objective`: a frozen dataclass with these methods.

    The names of the arguments matter too: the command line compares them when it reads the fields of an objective.
    """

    def loss(self, apply, params, batch, key):
        """Computes a batch's loss: a pure function.

        Args:
            apply: apply(params, batch, method=None), the model.
            key: random key of this step.

        Returns:
            (float32, metrics): scalars by name. The metric `weight` weights means over several batches.
        """

    def check(self, stage: Stage, model: Any) -> None:
        """Refuses a stage with this objective that cannot train a model of this config.

        Args:
            stage: its mixtures, trainable patterns and `cache_features` are checked too; see
                `mllm_jax.training.objectives.checks`.

        Raises:
            ConfigError: reports what the objective needs.
        """
