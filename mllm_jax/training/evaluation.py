"""What a model is evaluated by, while it trains and after: the protocol of a task, and what it gives."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

from mllm_jax.data.message import Image
from mllm_jax.generation.assistant import Assistant

BATCH = 64
EVALUATION = "evaluation/"  # what the names of a task's metrics begin with in metrics.jsonl


@dataclass(frozen=True)
class Prediction:
    """What a model said about one example.

    Attributes:
        id: the example's own, or its number.
        images: what it was asked about.
        reference: the right answer; None: the example has none.
        correct: whether the answer is right; None: it cannot be said of one example.
    """

    id: str | int
    question: str
    images: tuple[Image, ...]
    answer: str
    reference: str | None
    correct: bool | None


@dataclass(frozen=True)
class Measured:
    """What came of an evaluation: each metric's value, and the predictions that are reported."""

    metrics: dict[str, float]
    predictions: list[Prediction]


@runtime_checkable
class Evaluation(Protocol):
    """What `Experiment.evaluation` is a tuple of: frozen dataclasses with these methods, such as `Task`.

    Attributes:
        name: names its results; what precedes a "/" groups it with others.
    """

    @property
    def name(self) -> str: ...

    def check(self, model: Any) -> None:
        """Raises ConfigError if a model of this config cannot be asked so."""

    def measure(self, assistant: Assistant, *, limit: int | None = None, batch_size: int = BATCH) -> Measured:
        """Evaluates a model.

        Args:
            limit: only the first `limit` examples.
        """
        ...
