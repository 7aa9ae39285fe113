"""Accuracy of a model on question sets, each figure beside its controls."""

from __future__ import annotations

import base64
import io
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Protocol

import numpy as np

from mllm_jax.data.message import Image, Message, Text
from mllm_jax.errors import DataError
from mllm_jax.generation.assistant import Assistant
from mllm_jax.generation.options import Options

CONTROL_ANSWERS = 300


class Question(Protocol):
    """One question about pictures with its one right answer; `task` groups questions for a score."""

    task: str
    question: str
    answer: str
    images: tuple[np.ndarray, ...]  # uint8[H, W, 3] each, of the encoder's size


def normalise(text: str) -> str:
    """What is compared: lower case, single spaces, no full stop at the end."""
    return " ".join(text.lower().split()).rstrip(" .")


def shuffles(count: int, seed: int = 0) -> list[np.ndarray]:
    """Permutations that leave nothing in its place (count >= 2): whose pictures each question gets as a control.

    Few questions are shuffled several times, so that the control is no matter of luck.
    """
    rng = np.random.default_rng(seed)
    out = []
    for _ in range(min(8, -(-CONTROL_ANSWERS // count))):
        order = rng.permutation(count)
        partner = np.empty(count, int)
        partner[order] = np.roll(order, 1)
        out.append(partner)
    return out


def majority(answers: Sequence[str]) -> float:
    """The accuracy of always giving the most frequent answer."""
    return Counter(map(normalise, answers)).most_common(1)[0][1] / len(answers)


def evaluate(
    assistant: Assistant,
    splits: Mapping[str, Sequence[Question]],
    shown_per_task: int = 4,
    batch_size: int = 64,
    max_new_tokens: int = 32,
) -> tuple[dict, list]:
    """Scores every task of every split by exact match after `normalise`.

    Each accuracy stands beside two controls: the same questions with the pictures shuffled among them, and the most
    frequent answer.

    Returns:
        results {"splits": {name: {task: {"accuracy", "accuracy_shuffled_images", "majority", "n"}}}}, and examples
        for the report, the first of each task, with pictures as base64 PNG.

    Raises:
        DataError: a task of a single question, which no control can be made for.
    """
    results: dict = {"splits": {}}
    examples: list = []
    for split, questions in splits.items():
        scores = results["splits"][split] = {}
        for task in sorted({q.task for q in questions}):
            asked = [q for q in questions if q.task == task]
            if len(asked) < 2:
                raise DataError(f"{split}/{task}: one question", "at least two", "raise the number of questions")
            pictures = [q.images for q in asked]
            orders = shuffles(len(asked))
            control_pictures = [pictures[i] for order in orders for i in order]
            prompts = [
                assistant.prompt((Message("user", (*map(Image, images), Text(q.question))),))
                for q, images in zip(asked * (1 + len(orders)), pictures + control_pictures, strict=True)
            ]
            said = assistant.complete(prompts, Options(max_new_tokens=max_new_tokens), batch_size=batch_size)
            answers, control = [a.text for a in said[: len(asked)]], [a.text for a in said[len(asked) :]]
            right = [normalise(a) == normalise(q.answer) for a, q in zip(answers, asked, strict=True)]
            truths = asked * len(orders)
            right_control = [normalise(a) == normalise(q.answer) for a, q in zip(control, truths, strict=True)]
            scores[task] = {
                "accuracy": float(np.mean(right)),
                "accuracy_shuffled_images": float(np.mean(right_control)),
                "majority": majority([q.answer for q in asked]),
                "n": len(asked),
            }
            for i in range(min(shown_per_task, len(asked))):
                examples.append(
                    {
                        "split": split,
                        "task": task,
                        "image_png_base64": [picture_png(image) for image in pictures[i]],
                        "question": asked[i].question,
                        "answer": answers[i],
                        "truth": asked[i].answer,
                        "correct": bool(right[i]),
                    }
                )
    return results, examples


def picture_png(image: np.ndarray) -> str:
    from PIL import Image

    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "PNG")
    return base64.b64encode(buffer.getvalue()).decode()
