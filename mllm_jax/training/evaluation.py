"""The protocol of evaluations, which run while a model trains and afterwards, and their results."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

from mllm_jax.data.message import Part
from mllm_jax.generation.assistant import Assistant

BATCH = 64
EVALUATION = "evaluation/"  # the prefix of a task's metrics in metrics.jsonl


@dataclass(frozen=True)
class Prediction:
    """A model's answer to one example.

    Attributes:
        id: the example's own id, or its index.
        media: of the question.
        reference: the right answer; None: the example has none.
        correct: whether the answer is right; None: undefined for a single example.
    """

    id: str | int
    question: str
    media: tuple[Part, ...]
    answer: str
    reference: str | None
    correct: bool | None


@dataclass(frozen=True)
class Measured:
    """The result of an evaluation: the value of each metric, and the predictions to report."""

    metrics: dict[str, float]
    predictions: list[Prediction]


@runtime_checkable
class Evaluation(Protocol):
    """Interface of the items of `Experiment.evaluation`: frozen dataclasses with these methods, such as `Task`.

    Attributes:
        name: names its results; the part before a "/" groups them with others.
    """

    @property
    def name(self) -> str: ...

    def check(self, model: Any) -> None:
        """Raises ConfigError if a model with this config cannot do the evaluation."""

    def measure(self, assistant: Assistant, *, limit: int | None = None, batch_size: int = BATCH) -> Measured:
        """Evaluates a model.

        Args:
            limit: evaluates only the first `limit` examples.
        """
        ...
