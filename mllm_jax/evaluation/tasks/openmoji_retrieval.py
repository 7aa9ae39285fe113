"""Names among names and pictures among pictures of emoji, for dual encoders."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from mllm_jax.datasets.openmoji.galleries import WAYS, Gallery, gallery
from mllm_jax.errors import ConfigError
from mllm_jax.evaluation.metrics import shuffles
from mllm_jax.evaluation.retrieval import rank_of_own
from mllm_jax.evaluation.task import BATCH, Measured, Prediction
from mllm_jax.evaluation.tasks.openmoji import SPLITS
from mllm_jax.generation.assistant import Assistant
from mllm_jax.models.clip import DualEncoderConfig

QUESTIONS = {"image_to_text": "Which of {} captions?", "text_to_image": "Which of {} pictures? {}"}


def openmoji_retrieval_tasks(
    config: str = "quickstart",
    splits: tuple[str, ...] = SPLITS,
    image_size: int = 64,
    ways: int = 300,
    seed: int = 0,
    data_dir: str | None = None,
) -> tuple[OpenMojiRetrieval, ...]:
    """Both ways on each split: "composition/image_to_text", "composition/text_to_image", ..."""
    return tuple(
        OpenMojiRetrieval(way, split, config, image_size, ways, seed, data_dir) for split in splits for way in WAYS
    )


@dataclass(frozen=True)
class OpenMojiRetrieval:
    """Recall at 1 (as "accuracy"), 5 and 10 in a gallery; a tie is a miss.

    The controls: the same search with the images shuffled among those asked for, and always the same answer.

    Attributes:
        way: "image_to_text" looks for the caption of each image, "text_to_image" for the image of each caption.
        ways: images and captions that each is looked for among; see `mllm_jax.datasets.openmoji.galleries`.
    """

    way: str
    split: str
    config: str = "quickstart"
    image_size: int = 64
    ways: int = 300
    seed: int = 0
    data_dir: str | None = None

    @property
    def name(self) -> str:
        return f"{self.split}/{self.way}"

    def check(self, model: Any) -> None:
        if not isinstance(model, DualEncoderConfig):
            raise ConfigError(
                f"task {self.name!r} of a {type(model).__name__}",
                "a dual encoder, which compares images and texts",
                "change the evaluation",
            )

    def evaluate(self, assistant: Assistant, *, limit: int | None = None, batch_size: int = BATCH) -> Measured:
        made = gallery(self.config, self.split, self.image_size, self.ways, self.seed, self.data_dir)
        return search(assistant, made, self.way, limit)


def search(assistant: Assistant, gallery: Gallery, way: str, limit: int | None = None) -> Measured:
    """Looks in a gallery for the first `limit` of those asked for."""
    images, texts = assistant.embed(images=gallery.pictures), assistant.embed(texts=gallery.captions)
    asked = np.arange(gallery.asked if limit is None else min(limit, gallery.asked))
    everyone = np.arange(len(images))
    queries, keys = (images, texts) if way == "image_to_text" else (texts, images)
    ranks = rank_of_own(queries[asked], keys, asked, everyone)
    values = {"accuracy": float((ranks < 1).mean())}
    if len(asked) > 1:
        # The query is that of one image or caption, what counts as its own that of another.
        shuffled = [rank_of_own(queries[asked], keys, partner, everyone) for partner in shuffles(len(asked))]
        values["shuffled_media"] = float(np.mean([rank < 1 for rank in shuffled]))
    values |= {
        "majority": 1 / len(asked),
        "n": len(asked),
        "ways": len(everyone),
        "recall_at_5": float((ranks < 5).mean()),
        "recall_at_10": float((ranks < 10).mean()),
    }
    found = (queries[asked] @ keys.T).argmax(axis=1)
    return Measured(values, list(_predictions(gallery, way, found, ranks < 1)))


def _predictions(gallery: Gallery, way: str, found: np.ndarray, correct: np.ndarray) -> Iterator[Prediction]:
    captions = gallery.captions
    for query, (answer, right) in enumerate(zip(found.tolist(), correct.tolist(), strict=True)):
        # Of a caption the image that was found is shown.
        shown = query if way == "image_to_text" else answer
        yield Prediction(
            query,
            QUESTIONS[way].format(len(captions), f'"{captions[query]}"'),
            captions[answer],
            reference=captions[query],
            correct=right,
            images=(gallery.pictures[shown],),
        )
