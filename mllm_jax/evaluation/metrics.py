"""Metrics of a task, each a function of (answers, examples); controls are metrics too."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol, runtime_checkable

import numpy as np

from mllm_jax.data.message import Example, Message, Text
from mllm_jax.generation.options import Answer

CONTROL_ANSWERS = 300

Metric = Callable[[list[Answer], list[Any]], float]


@runtime_checkable
class Referenced(Protocol):
    """An example that knows the answers that are right; the first is the one that is shown."""

    @property
    def answers(self) -> tuple[str, ...]: ...


@runtime_checkable
class ScoresEach(Protocol):
    """A metric that also judges a single answer: 1 is right."""

    def score(self, answer: Answer, example: Any) -> float: ...


@runtime_checkable
class AsksAgain(Protocol):
    """A metric of answers to conversations of its own, which `evaluate` asks beside the task's."""

    def again(self, conversations: Sequence[tuple[Message, ...]]) -> list[tuple[int, tuple[Message, ...]]]:
        """Conversations and the number of the example that each belongs to; none: the metric is left out."""
        ...

    def __call__(self, answers: list[Answer], examples: list[Any]) -> float: ...


def normalise(text: str) -> str:
    """What is compared: lower case, single spaces, no full stop at the end."""
    return " ".join(text.lower().split()).rstrip(" .")


def references(example: Any) -> tuple[str, ...]:
    """The right answers that an example has: its `answers`, a mapping's "answer", or a conversation's last message."""
    if isinstance(example, Referenced):
        return tuple(example.answers)
    if isinstance(example, Example):
        last = example.messages[-1]
        return (last.text,) if last.role == "assistant" else ()
    found = example.get("answer", ()) if isinstance(example, Mapping) else ()
    return (found,) if isinstance(found, str) else tuple(found)


def exact_match(answer: Answer, example: Any) -> float:
    """1 where the answer is one of the right ones, after `normalise`."""
    return float(normalise(answer.text) in map(normalise, references(example)))


@dataclass(frozen=True)
class Mean:
    """The mean over examples of a score of each answer, which says of each whether it is right."""

    score: Callable[[Answer, Any], float]

    def __call__(self, answers: list[Answer], examples: list[Any]) -> float:
        return float(np.mean([self.score(*pair) for pair in zip(answers, examples, strict=True)]))


def majority(answers: list[Answer], examples: list[Any]) -> float:
    """Control: the accuracy of always giving the most frequent right answer."""
    counts = Counter(text for example in examples for text in set(map(normalise, references(example))))
    return max(counts.values(), default=0) / len(examples)


def count(answers: list[Answer], examples: list[Any]) -> int:
    """The number of examples."""
    return len(examples)


@dataclass(frozen=True)
class Shuffled:
    """Control: a metric of the same questions, each asked about the media of another.

    Media are exchanged among examples with as many media of the same kinds; an example without media, or without
    another such example, is not asked. Where none is, the control is left out of the results.
    """

    metric: Metric
    seed: int = 0

    def again(self, conversations: Sequence[tuple[Message, ...]]) -> list[tuple[int, tuple[Message, ...]]]:
        media = [Example(messages).media for messages in conversations]
        groups: dict[tuple[type, ...], list[int]] = {}
        for number, parts in enumerate(media):
            groups.setdefault(tuple(map(type, parts)), []).append(number)
        return [
            (number, _with_media(conversations[number], media[group[partner]]))
            for kinds, group in groups.items()
            if kinds and len(group) > 1
            for order in shuffles(len(group), self.seed)
            for number, partner in zip(group, order, strict=True)
        ]

    def __call__(self, answers: list[Answer], examples: list[Any]) -> float:
        return self.metric(answers, examples)


def shuffles(count: int, seed: int = 0) -> list[np.ndarray]:
    """Permutations that leave nothing in its place (count >= 2): whose media each question gets as a control.

    Few questions are shuffled several times, so that the control does not depend on luck.
    """
    rng = np.random.default_rng(seed)
    out = []
    for _ in range(min(8, -(-CONTROL_ANSWERS // count))):
        order = rng.permutation(count)
        partner = np.empty(count, int)
        partner[order] = np.roll(order, 1)
        out.append(partner)
    return out


def _with_media(messages: tuple[Message, ...], media: Sequence[Any]) -> tuple[Message, ...]:
    """The same text with other media in the positions of its own."""
    others = iter(media)
    return tuple(
        replace(message, content=tuple(part if isinstance(part, Text) else next(others) for part in message.parts))
        for message in messages
    )


accuracy = Mean(exact_match)
# What a task of questions with right answers measures, unless it has metrics of its own.
QUESTION_METRICS = {
    "accuracy": accuracy,
    "shuffled_media": Shuffled(accuracy),
    "majority": majority,
    "n": count,
}
