"""The user's own questions as a task: free answers or choices, with their controls."""

from __future__ import annotations

import os

from mllm_jax.data.message import Message, Text
from mllm_jax.datasets.questions import Question, Questions, option
from mllm_jax.evaluation.metrics import ShuffledMedia, accuracy, count, majority
from mllm_jax.evaluation.task import Metric, Task

CHOOSE = "Answer with the option's letter from the given choices directly."


def ask(question: Question) -> tuple[Message, ...]:
    """Returns the images, the question, and the choices by their letters, as one message."""
    text = question.question
    if question.choices:
        offered = [option(index, choice) for index, choice in enumerate(question.choices)]
        text = "\n".join((text, *offered, CHOOSE))
    return (Message("user", (*question.images, Text(text))),)


def questions_task(
    path: str | os.PathLike,
    media_folder: str | os.PathLike | None = None,
    name: str = "questions",
    *,
    limit: int | None = None,
) -> Task:
    """Builds a task from a file of questions; reads the file to find out which controls it can have.

    Free answers are right if they equal an accepted one after `normalise`; choices are named by letter or text. Two
    questions or more have the majority answer as a control; two or more with images also have shuffled images.

    Args:
        path, media_folder: see `mllm_jax.Questions`.
        limit: number of questions to ask, from the first on.

    Raises:
        DataError: see `Questions.build`.
    """
    source = Questions(path, media_folder)
    found = source.build()[:limit]
    metrics: dict[str, Metric] = {"accuracy": accuracy}
    if sum(bool(question.images) for question in found) > 1:
        metrics["accuracy_shuffled_media"] = ShuffledMedia(accuracy)
    if len(found) > 1:
        metrics["majority"] = majority
    return Task(name, source, ask, metrics | {"n": count})
