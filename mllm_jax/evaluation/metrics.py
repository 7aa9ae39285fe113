"""Metrics: functions of answers and examples. Controls are metrics too."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol, runtime_checkable

import numpy as np

from mllm_jax.data.message import Example, Message, Part, Text
from mllm_jax.data.packages import media_package
from mllm_jax.errors import ConfigError, DataError, TooFewError
from mllm_jax.generation.options import Answer

CONTROL_ANSWERS = 300


@runtime_checkable
class AsksAgain(Protocol):
    """A metric that needs answers to other questions than the task's own."""

    def again(self, asked: Sequence[tuple[Message, ...]]) -> list[tuple[int, tuple[Message, ...]]]:
        """Returns conversations to answer, each with the index of the example that its answer belongs to.

        Args:
            asked: the conversation of each example.
        """
        ...

    def __call__(self, answers: Sequence[Answer], examples: Sequence[Any]) -> float: ...


def normalise(text: str) -> str:
    """Normalises a text for comparison: lower case, single spaces, no final full stop."""
    return " ".join(text.lower().split()).rstrip(" .")


def references(example: Any) -> tuple[str, ...]:
    """Returns the right answers of an example, of which the report shows the first; empty if it has none.

    They are the last assistant message of an `Example`, else the field `answers` or `answer`.
    """
    if isinstance(example, Example):
        return tuple(message.text for message in example.messages if message.role == "assistant")[-1:]
    if isinstance(example, Mapping):
        given = example.get("answers", example.get("answer", ()))
    else:
        given = getattr(example, "answers", getattr(example, "answer", ()))
    return (given,) if isinstance(given, str) else tuple(given)


def accuracy(answers: Sequence[Answer], examples: Sequence[Any]) -> float:
    """Returns the share of answers that equal one of their references after `normalise`.

    Raises:
        DataError: an example without an answer.
    """
    right = [normalise(answer.text) in _accepted(one) for answer, one in zip(answers, examples, strict=True)]
    return sum(right) / len(right)


def majority(answers: Sequence[Answer], examples: Sequence[Any]) -> float:
    """Returns the accuracy of always giving the most frequent right answer."""
    counts = Counter(text for example in examples for text in _accepted(example))
    return counts.most_common(1)[0][1] / len(examples)


def wer(answers: Sequence[str], targets: Sequence[str]) -> float:
    """Returns the word error rate over all texts: wrong, missing and added words / words of the targets.

    Texts are compared as they are; see `mllm_jax.data.processing.text_normalizer`. Every word of the answer to an empty
    target is an added one. If all targets are empty, the rate is 0 if all answers are empty too, else 1.

    Raises:
        DataError: no texts, or another number of answers than of targets; or the package jiwer is missing.
    """
    return _error_rate("wer", answers, targets)


def cer(answer: str, target: str) -> float:
    """Returns the character error rate of one text; counts and raises as `wer`, also for an empty target."""
    return _error_rate("cer", [answer], [target])


def _error_rate(name: str, answers: Sequence[str], targets: Sequence[str]) -> float:
    if isinstance(answers, str) or isinstance(targets, str) or not len(answers) == len(targets) > 0:
        raise DataError(
            f"the {name} of {len(answers):,} answers to {len(targets):,} targets"
            f"{', given as one text' if isinstance(answers, str) or isinstance(targets, str) else ''}",
            "lists of texts of equal length, at least one",
            "give one answer for each target",
        )
    jiwer = media_package("jiwer", f"the {name}")
    if not any(target.strip() for target in targets):
        return float(any(answer.strip() for answer in answers))
    # jiwer splits words at spaces alone
    texts = [[" ".join(text.split()) for text in each] for each in (targets, answers)]
    return float(getattr(jiwer, name)(*texts))


_UNITS = {"word": "wer", "character": "cer"}


@dataclass(frozen=True)
class ErrorRate:
    """The word error rate of a task's answers, or the character error rate, over all examples; lower is better.

    An example's target is its first reference.

    Attributes:
        unit: "word" or "character".
        normalise: applied to answers and targets, such as `EnglishNormalizer(folder)`.
    """

    unit: str = "word"
    normalise: Callable[[str], str] = normalise

    def __post_init__(self):
        if self.unit not in _UNITS:
            raise ConfigError(f"an error rate by {self.unit!r:.40}", "'word' or 'character'", "change the unit")

    def __call__(self, answers: Sequence[Answer], examples: Sequence[Any]) -> float:
        targets = []
        for example in examples:
            if not (found := references(example)):
                raise _without_answer(example)
            targets.append(self.normalise(found[0]))
        return _error_rate(_UNITS[self.unit], [self.normalise(answer.text) for answer in answers], targets)


def count(answers: Sequence[Answer], examples: Sequence[Any]) -> int:
    """Returns the number of examples, reported as "n"."""
    return len(examples)


def _accepted(example: Any) -> set[str]:
    if not (found := references(example)):
        raise _without_answer(example)
    return set(map(normalise, found))


def _without_answer(example: Any) -> DataError:
    return DataError(f"an example without an answer: {example!r:.100}", "`answer` or `answers`", "use other metrics")


@dataclass(frozen=True)
class ShuffledMedia:
    """Another metric with the media of another example in each question: the accuracy that the words alone give.

    Examples without media are left out. With few examples, the metric averages several shuffles.
    """

    metric: Callable[[Sequence[Answer], Sequence[Any]], float]
    seed: int = 0

    def again(self, asked: Sequence[tuple[Message, ...]]) -> list[tuple[int, tuple[Message, ...]]]:
        """Implements `AsksAgain`. Raises TooFewError: fewer than two examples with media."""
        media = {index: found for index, messages in enumerate(asked) if (found := _media(messages))}
        if len(media) < 2:
            raise TooFewError(
                f"shuffled media of {len(media)} example(s) with media", "at least two", "raise the number of examples"
            )
        numbers = list(media)
        return [
            (own, tuple(_exchanged(asked[own], media[numbers[other]])))
            for order in shuffles(len(numbers), self.seed)
            for own, other in zip(numbers, order, strict=True)
        ]

    def __call__(self, answers: Sequence[Answer], examples: Sequence[Any]) -> float:
        return self.metric(answers, examples)


def shuffles(count: int, seed: int = 0) -> list[np.ndarray]:
    """Returns permutations without fixed points (count >= 2): the source of each example's media in the control."""
    rng = np.random.default_rng(seed)
    out = []
    for _ in range(min(8, -(-CONTROL_ANSWERS // count))):
        order = rng.permutation(count)
        partner = np.empty(count, int)
        partner[order] = np.roll(order, 1)
        out.append(partner)
    return out


def _media(messages: Sequence[Message]) -> list[Part]:
    return [part for message in messages for part in message.parts if not isinstance(part, Text)]


def _exchanged(messages: Sequence[Message], media: Sequence[Part]) -> Iterator[Message]:
    """Yields the messages with other media: one for one, or all at the first position if the numbers differ."""
    left = list(media)
    together = len(_media(messages)) != len(media)
    for message in messages:
        parts: list[Part] = []
        for part in message.parts:
            if isinstance(part, Text):
                parts.append(part)
            elif left:
                parts += left if together else left[:1]
                left = [] if together else left[1:]
        yield message if isinstance(message.content, str) else replace(message, content=tuple(parts))
