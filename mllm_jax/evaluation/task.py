"""The task of questions that an assistant answers."""

from __future__ import annotations

import math
import numbers
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

from flax.core import FrozenDict

from mllm_jax.data.message import Conversation, Message, Text, conversation
from mllm_jax.errors import ConfigError, DataError, TooFewError
from mllm_jax.evaluation.metrics import AsksAgain, references
from mllm_jax.generation.assistant import Assistant, writes_text
from mllm_jax.generation.options import Answer
from mllm_jax.training.evaluation import BATCH, Measured, Prediction

CHUNK = 512  # conversations whose media are in memory at a time

Metric = Callable[[Sequence[Answer], Sequence[Any]], float]


@runtime_checkable
class Examples(Protocol):
    """Random access to examples of any kind."""

    def __len__(self) -> int: ...

    def example(self, index: int) -> Any: ...


@dataclass(frozen=True)
class Task:
    """Examples, a prompt for each, and metrics of the answers.

    Attributes:
        name: of its results; the part before a "/" groups them, as in "validation/naming".
        source: a sequence of examples, an object with `__len__` and `example(index)`, or a config whose `build()` gives
            either. An example is anything that `prompt` and `metrics` understand.
        prompt: example -> conversation.
        metrics: {name: (answers, examples) -> float}, with answers and examples in the same order; see
            `mllm_jax.evaluation.metrics`. The metric "accuracy" is also called with a single answer: if it gives 1 or
            0, the answer is reported as right or wrong.
        max_new_tokens: maximum number of tokens of an answer.
        options: further options of `Assistant.generate`.
    """

    name: str
    source: Any
    prompt: Callable[[Any], Conversation]
    metrics: Mapping[str, Metric]
    max_new_tokens: int = field(default=32, kw_only=True)
    options: Mapping[str, Any] = field(default=FrozenDict(), kw_only=True)

    def __post_init__(self):
        if not self.name.strip() or not self.metrics or not all(map(callable, (self.prompt, *self.metrics.values()))):
            raise ConfigError(
                f"task {self.name!r} with prompt {self.prompt!r:.80} and metrics {dict(self.metrics)!r:.200}",
                "a name, a function example -> conversation, and functions (answers, examples) -> float by name",
                "correct the task",
            )
        object.__setattr__(self, "metrics", FrozenDict(self.metrics))
        object.__setattr__(self, "options", FrozenDict(self.options))
        if isinstance(self.source, list):
            object.__setattr__(self, "source", tuple(self.source))

    def check(self, model: Any) -> None:
        """Raises ConfigError: a model that generates no text."""
        if not writes_text(model):
            raise ConfigError(
                f"task {self.name!r} for a {type(model).__name__}", "a model that answers questions", "drop the task"
            )

    def examples(self, limit: int | None = None) -> list[Any]:
        """Returns the first `limit` examples.

        Raises:
            TooFewError: there are none.
            ConfigError: a source of another kind.
        """
        build = getattr(self.source, "build", None)
        source = self.source if build is None else build()
        listed = isinstance(source, Sequence) and not isinstance(source, (str, bytes))
        if not listed and not isinstance(source, Examples):
            raise ConfigError(
                f"task {self.name!r} with a source that is a {type(source).__name__}",
                "a sequence, or an object with __len__ and example(index)",
                "change the task's source",
            )
        count = len(source) if limit is None else min(limit, len(source))
        if count < 1:
            raise TooFewError(
                f"task {self.name!r} with {len(source)} example(s), limit {limit}", "at least one", "change the source"
            )
        return list(source[:count]) if listed else [source.example(index) for index in range(count)]

    def measure(self, assistant: Assistant, *, limit: int | None = None, batch_size: int = BATCH) -> Measured:
        """Asks about each example, and again where a metric needs it; see `Evaluation`."""
        examples = self.examples(limit)
        asked = [conversation(self.prompt(example)) for example in examples]
        controls = {name: each.again(asked) for name, each in self.metrics.items() if isinstance(each, AsksAgain)}
        everything = [*asked, *(messages for again in controls.values() for _, messages in again)]
        said = self._answers(assistant, everything, batch_size)
        answers, rest = said[: len(asked)], iter(said[len(asked) :])
        found = {}
        for name, metric in self.metrics.items():
            if name in controls:
                judged = [examples[index] for index, _ in controls[name]]
                found[name] = self._number(name, metric([next(rest) for _ in judged], judged))
            else:
                found[name] = self._number(name, metric(answers, examples))
        each = zip(range(len(examples)), asked, answers, examples, strict=True)
        return Measured(found, [self._prediction(*one) for one in each])

    def _answers(self, assistant: Assistant, asked: Sequence[tuple[Message, ...]], batch_size: int) -> list[Answer]:
        said: list[Answer] = []
        for start in range(0, len(asked), CHUNK):
            chunk = list(asked[start : start + CHUNK])
            how = dict(batch_size=batch_size, max_new_tokens=self.max_new_tokens)
            said += assistant.generate(chunk, **how, **self.options)
        return said

    def _number(self, name: str, value: Any) -> float:
        if not isinstance(value, numbers.Real) or not math.isfinite(value):
            raise DataError(f"metric {name!r} of task {self.name!r} gave {value!r:.80}", "a number", "correct it")
        return int(value) if isinstance(value, numbers.Integral) else float(value)

    def _prediction(self, index: int, messages: Sequence[Message], answer: Answer, example: Any) -> Prediction:
        score = self.metrics["accuracy"]([answer], [example]) if "accuracy" in self.metrics else None
        identity = getattr(example, "id", None)
        return Prediction(
            id=identity if isinstance(identity, str) and identity else index,
            question="\n".join(message.text for message in messages if message.role != "system"),
            media=tuple(part for message in messages for part in message.parts if not isinstance(part, Text)),
            answer=answer.text,
            reference=next(iter(references(example)), None),
            correct=bool(score) if score in (0, 1) else None,
        )
