"""Questions of one's own, free or with choices; see `mllm_jax.Questions` for the file."""

from __future__ import annotations

import os
import re
from pathlib import Path

from mllm_jax.data.message import Message, Text
from mllm_jax.datasets.questions import LETTERS, Question, Questions
from mllm_jax.evaluation.metrics import Mean, Shuffled, count, exact_match, majority, normalise
from mllm_jax.evaluation.task import Task
from mllm_jax.generation.options import Answer

INSTRUCTION = "Answer with the option's letter from the given choices directly."  # as LLaVA-1.5 was trained with


def questions_task(
    path: str | os.PathLike,
    media_folder: str | os.PathLike | None = None,
    *,
    name: str | None = None,
    max_new_tokens: int = 32,
) -> Task:
    """The task of a file of questions; the file is read when its questions are asked.

    Its metrics: "accuracy" by exact match after `normalise`, of choices by letter or text; the controls
    "shuffled_media", of questions with images, and "majority"; "n", the number of questions.

    Args:
        name: None: "questions/" and the file's name without its suffix.
    """
    source = Questions(path, media_folder)
    control = {} if media_folder is None else {"shuffled_media": Shuffled(accuracy)}
    metrics = {"accuracy": accuracy, **control, "majority": majority, "n": count}
    return Task(name or f"questions/{Path(source.path).stem}", source, ask, metrics, max_new_tokens)


def ask(question: Question) -> tuple[Message, ...]:
    """The images, the question, and its choices in lines with letters."""
    options = [f"{letter}. {choice}" for letter, choice in zip(LETTERS, question.choices, strict=False)]
    text = "\n".join([question.question, *options, *([INSTRUCTION] if options else [])])
    return (Message("user", (*question.media, Text(text))),)


def right(answer: Answer, question: Question) -> float:
    """1 where a free answer is one of the right ones, or where the right choice is named by its letter or its text."""
    if not question.choices:
        return exact_match(answer, question)
    letters = LETTERS[: len(question.choices)]
    return float(chosen(answer.text, question.choices) == letters.index(question.answers[0]))


def chosen(text: str, choices: tuple[str, ...]) -> int | None:
    """Which choice an answer names: "B", "(b)", "B. a dog" or "a dog"; None: none of them."""
    said, texts = normalise(text), [normalise(choice) for choice in choices]
    letters = LETTERS[: len(choices)].lower()
    if alone := re.fullmatch(rf"\(?([{letters}])[).:]*", said):
        return letters.index(alone[1])
    if said in texts:
        return texts.index(said)
    before = re.match(rf"\(?([{letters}])[).:]\s", said)
    return letters.index(before[1]) if before else None


accuracy = Mean(right)
