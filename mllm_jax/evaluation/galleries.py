"""Recall of a dual encoder in a gallery of images and captions, with a control for each figure."""

from __future__ import annotations

from typing import Protocol

import numpy as np

from mllm_jax.data.message import Image
from mllm_jax.errors import DataError
from mllm_jax.evaluation.metrics import shuffles
from mllm_jax.evaluation.retrieval import rank_of_own
from mllm_jax.evaluation.task import Measured, Prediction
from mllm_jax.generation.assistant import Assistant

QUESTIONS = {"image_to_text": "Which of {} captions?", "text_to_image": "Which of {} images? {}"}


class Gallery(Protocol):
    """Paired images and captions, all different; the first `asked` are the queries, all are keys."""

    task: str  # "image_to_text" or "text_to_image"
    images: tuple[np.ndarray, ...]  # uint8[H, W, 3] each
    captions: tuple[str, ...]
    asked: int


def search(assistant: Assistant, gallery: Gallery, limit: int | None = None) -> Measured:
    """Measures recall at 1 (as "accuracy"), 5 and 10 in a gallery of "ways" images; a tie is a miss.

    The controls are the same search with shuffled images of the queries, and one fixed answer.

    Raises:
        DataError: a single query, for which there is no control.
    """
    asked = np.arange(min(gallery.asked, limit or gallery.asked))
    if len(asked) < 2:
        raise DataError(f"{gallery.task} with {len(asked)} query", "at least two", "raise the number of examples")
    images, texts = assistant.embed(images=list(gallery.images)), assistant.embed(texts=gallery.captions)
    everyone = np.arange(len(images))
    queries, keys = (images, texts) if gallery.task == "image_to_text" else (texts, images)
    ranks = rank_of_own(queries[asked], keys, asked, everyone)
    # The query comes from one image or caption; its right answer is that of another.
    shuffled = [rank_of_own(queries[asked], keys, partner, everyone) for partner in shuffles(len(asked))]
    metrics = {
        "accuracy": float((ranks < 1).mean()),
        "accuracy_shuffled_media": float(np.mean([rank < 1 for rank in shuffled])),
        "majority": 1 / len(asked),
        "n": len(asked),
        "ways": len(everyone),
        "recall_at_5": float((ranks < 5).mean()),
        "recall_at_10": float((ranks < 10).mean()),
    }
    found = [int((keys @ queries[query]).argmax()) for query in asked]
    return Measured(metrics, [_prediction(gallery, int(q), found[q], bool(ranks[q] < 1)) for q in asked])


def _prediction(gallery: Gallery, query: int, found: int, correct: bool) -> Prediction:
    captions = gallery.captions
    if gallery.task == "image_to_text":
        shown, question = query, QUESTIONS[gallery.task].format(len(captions))
    else:  # the retrieved image, with the caption that was the query
        shown, question = found, QUESTIONS[gallery.task].format(len(captions), f'"{captions[query]}"')
    image = Image(gallery.images[shown])
    return Prediction(query, question, (image,), captions[found], captions[query], correct)
