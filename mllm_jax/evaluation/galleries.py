"""Recall of a dual encoder in galleries of pictures and captions, each figure beside its control."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol

import numpy as np

from mllm_jax.evaluation.evaluate import picture_png, shuffles
from mllm_jax.evaluation.retrieval import rank_of_own
from mllm_jax.generation.embed import Embedder

QUESTIONS = {"image_to_text": "Which of {} captions?", "text_to_image": "Which of {} pictures? {}"}


class Gallery(Protocol):
    """Pictures and captions that belong together, all different; the first `asked` are looked for among all."""

    task: str  # "image_to_text" or "text_to_image"
    pictures: tuple[np.ndarray, ...]  # uint8[H, W, 3] each
    captions: tuple[str, ...]
    asked: int


def evaluate_retrieval(
    embedder: Embedder, splits: Mapping[str, Sequence[Gallery]], shown_per_task: int = 12
) -> tuple[dict, list]:
    """Recall at 1 (as "accuracy"), 5 and 10 of each gallery; a tie is a miss.

    The controls: the same search with the pictures shuffled among those asked for, and always the same answer.

    Returns:
        results and examples as `mllm_jax.evaluation.evaluate.evaluate` gives them; beside the accuracy stand "ways",
        "recall_at_5" and "recall_at_10".
    """
    results: dict = {"splits": {}}
    examples: list = []
    for split, galleries in splits.items():
        scores = results["splits"][split] = {}
        for gallery in galleries:
            images, texts = embedder.pictures(gallery.pictures), embedder.texts(gallery.captions)
            asked, everyone = np.arange(gallery.asked), np.arange(len(images))
            queries, keys = (images, texts) if gallery.task == "image_to_text" else (texts, images)
            ranks = rank_of_own(queries[asked], keys, asked, everyone)
            # The query is that of one picture or caption, what counts as its own that of another.
            shuffled = [rank_of_own(queries[asked], keys, partner, everyone) for partner in shuffles(len(asked))]
            scores[gallery.task] = {
                "accuracy": float((ranks < 1).mean()),
                "accuracy_shuffled_images": float(np.mean([rank < 1 for rank in shuffled])),
                "majority": 1 / len(asked),
                "n": len(asked),
                "ways": len(everyone),
                "recall_at_5": float((ranks < 5).mean()),
                "recall_at_10": float((ranks < 10).mean()),
            }
            for query in asked[:shown_per_task]:
                found = int((keys @ queries[query]).argmax())
                examples.append(_example(split, gallery, int(query), found, bool(ranks[query] < 1)))
    return results, examples


def _example(split: str, gallery: Gallery, query: int, found: int, correct: bool) -> dict:
    captions = gallery.captions
    if gallery.task == "image_to_text":
        shown, question = query, QUESTIONS[gallery.task].format(len(captions))
    else:  # the picture that was found, beside the caption that it was looked for by
        shown, question = found, QUESTIONS[gallery.task].format(len(captions), f'"{captions[query]}"')
    return {
        "split": split,
        "task": gallery.task,
        "image_png_base64": [picture_png(gallery.pictures[shown])],
        "question": question,
        "answer": captions[found],
        "truth": captions[query],
        "correct": correct,
    }
