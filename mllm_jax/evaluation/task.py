"""Tasks: what a model is asked, and how its answers are measured."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import numpy as np
from flax.core import FrozenDict

from mllm_jax.data.message import Conversation, Example, Image, conversation
from mllm_jax.errors import ConfigError, DataError
from mllm_jax.evaluation.metrics import AsksAgain, ScoresEach, references
from mllm_jax.generation.assistant import Assistant, writes_text

BATCH = 64
TOGETHER = 1024  # conversations whose media are in memory at a time


@dataclass(frozen=True)
class Prediction:
    """What a model answered to one example.

    Attributes:
        index: of the example in its source; `id` is its own name, if it has one.
        reference: the right answer, where the example has one.
        correct: whether the answer is right, where a metric judges single answers.
        images: the sources of the images that were asked about.
    """

    index: int
    question: str
    answer: str
    id: str = ""
    reference: str | None = None
    correct: bool | None = None
    images: tuple[Any, ...] = ()


@dataclass(frozen=True)
class Measured:
    """The values of a task's metrics, and the answers that they were computed from."""

    values: dict[str, float]
    predictions: list[Prediction]


@runtime_checkable
class EvaluationTask(Protocol):
    """What `mllm_jax.evaluate` and `Experiment.evaluation` take: a `Task`, or a dataclass that asks in another way."""

    @property
    def name(self) -> str:
        """Names it in results.json; a `/` puts tasks of one beginning together."""
        ...

    def check(self, model: Any) -> None:
        """Raises ConfigError if a model of this config cannot be asked so. Touches no data."""
        ...

    def evaluate(self, assistant: Assistant, *, limit: int | None = None, batch_size: int = BATCH) -> Measured:
        """Asks the model about the first `limit` examples, or all."""
        ...


@runtime_checkable
class Examples(Protocol):
    """What a task reads examples from; see also `mllm_jax.Source`."""

    def __len__(self) -> int: ...

    def example(self, index: int) -> Any: ...


@runtime_checkable
class Buildable(Protocol):
    """A source's settings, as a mixture has them."""

    def build(self) -> Examples: ...


@dataclass(frozen=True)
class Task:
    """Questions that a model answers in text, and metrics of the answers.

    Attributes:
        source: has `__len__` and `example(index)`, or `build()`, which gives that; or is a sequence of examples.
        prompt: a function of an example: the conversation that the model is to answer.
        metrics: functions of (answers, examples) that give a number, by name. The first that judges single answers (see
            `mllm_jax.evaluation.metrics.ScoresEach`) says which predictions are correct.
        max_new_tokens: where an answer is cut off.
    """

    name: str
    source: Any
    prompt: Callable[[Any], Conversation]
    metrics: Mapping[str, Callable[..., float]]
    max_new_tokens: int = 32

    def __post_init__(self):
        if not isinstance(self.name, str) or not re.fullmatch(r"[^\x00-\x1f]{1,200}", self.name):
            raise ConfigError(f"a task named {self.name!r:.300}", "1 to 200 characters of one line", "rename it")
        metrics = self.metrics if isinstance(self.metrics, Mapping) else {}
        if not metrics or not callable(self.prompt) or not all(map(callable, metrics.values())):
            raise ConfigError(
                f"task {self.name!r}: prompt {self.prompt!r:.80}, metrics {self.metrics!r:.200}",
                "a function of an example, and functions of (answers, examples) by name, at least one",
                "change the task",
            )
        if isinstance(self.source, str) or not isinstance(self.source, Examples | Buildable | Sequence):
            raise ConfigError(
                f"task {self.name!r}: the source {self.source!r:.80}",
                "an object with __len__ and example(index), or a sequence of examples",
                "change the task's source",
            )
        if self.max_new_tokens < 1:
            raise ConfigError(f"task {self.name!r}: max_new_tokens {self.max_new_tokens}", "at least 1", "change it")
        object.__setattr__(self, "metrics", FrozenDict(metrics))
        if isinstance(self.source, list):
            object.__setattr__(self, "source", tuple(self.source))

    def check(self, model: Any) -> None:
        if not writes_text(model):
            raise ConfigError(
                f"task {self.name!r} of a {type(model).__name__}",
                "a model that writes text, such as a language model or a multimodal LLM",
                "change the evaluation",
            )

    def evaluate(self, assistant: Assistant, *, limit: int | None = None, batch_size: int = BATCH) -> Measured:
        """Asks the model.

        Raises:
            DataError: no example, one that cannot be read or asked, or a metric that gives no number.
        """
        examples = self.examples(limit)
        asked = [conversation(self.prompt(example)) for example in examples]
        again = {name: metric.again(asked) for name, metric in self.metrics.items() if isinstance(metric, AsksAgain)}
        every = [*asked, *(messages for more in again.values() for _, messages in more)]
        said = []
        for start in range(0, len(every), TOGETHER):
            part = every[start : start + TOGETHER]
            said += assistant.generate(part, batch_size=batch_size, max_new_tokens=self.max_new_tokens)
        answers, said = said[: len(asked)], said[len(asked) :]
        values = {}
        for name, metric in self.metrics.items():
            more = again.get(name)
            if more is None:
                values[name] = self._number(name, metric(answers, examples))
            elif more:
                own, said = said[: len(more)], said[len(more) :]
                values[name] = self._number(name, metric(own, [examples[number] for number, _ in more]))
        judge = next((metric for metric in self.metrics.values() if isinstance(metric, ScoresEach)), None)
        predictions = [
            Prediction(
                index,
                messages[-1].text,
                answer.text,
                id=_id(example),
                reference=next(iter(references(example)), None),
                correct=None if judge is None else bool(judge.score(answer, example) == 1),
                images=tuple(part.source for part in Example(messages).media if isinstance(part, Image)),
            )
            for index, (messages, answer, example) in enumerate(zip(asked, answers, examples, strict=True))
        ]
        return Measured(values, predictions)

    def examples(self, limit: int | None = None) -> list[Any]:
        """The first `limit` examples, or all. Raises DataError: there is none, or one cannot be read."""
        source = self.source
        if not isinstance(source, Examples) and isinstance(source, Buildable):
            source = source.build()
        read = source.example if isinstance(source, Examples) else source.__getitem__
        number = len(source) if limit is None else min(limit, len(source))
        if number < 1:
            raise DataError(f"task {self.name!r} without an example", "at least one", "change its source or the limit")
        return [read(index) for index in range(number)]

    def _number(self, metric: str, value: Any) -> float:
        number = np.asarray(value)
        if number.ndim == 0 and number.dtype.kind in "iuf" and np.isfinite(number):
            return number.item()
        raise DataError(
            f"task {self.name!r}: its metric {metric!r} gives {value!r:.80}", "a finite number", "mend the metric"
        )


def _id(example: Any) -> str:
    found = example.get("id", "") if isinstance(example, Mapping) else getattr(example, "id", "")
    return str(found)
