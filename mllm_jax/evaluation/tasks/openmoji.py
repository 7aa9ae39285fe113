"""The tasks that evaluate a model trained on OpenMoji."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from mllm_jax.data.message import Image, Message, Text
from mllm_jax.datasets.openmoji.evaluation import EvalQuestion, OpenMojiAsked, kinds_of
from mllm_jax.datasets.openmoji.galleries import WAYS, galleries
from mllm_jax.datasets.openmoji.skills import ASKED, OpenMojiSkillsAsked
from mllm_jax.errors import ConfigError
from mllm_jax.evaluation.galleries import search
from mllm_jax.evaluation.metrics import ShuffledMedia, accuracy, count, majority
from mllm_jax.evaluation.task import BATCH, Measured, Task
from mllm_jax.generation.assistant import Assistant
from mllm_jax.models.clip import DualEncoderConfig

SPLITS = ("validation", "composition", "unseen")
METRICS = {
    "accuracy": accuracy,
    "accuracy_shuffled_media": ShuffledMedia(accuracy),
    "majority": majority,
    "n": count,
}


def ask(question: EvalQuestion) -> tuple[Message, ...]:
    """Returns the images, then the question, as one message."""
    return (Message("user", (*map(Image, question.images), Text(question.question))),)


def openmoji_questions(
    config: str = "quickstart",
    splits: tuple[str, ...] = SPLITS,
    image_size: int = 64,
    limit: int = 200,
    seed: int = 0,
    data_dir: str | None = None,
) -> tuple[Task, ...]:
    """Returns a task for each split and kind of question; see `mllm_jax.datasets.openmoji.evaluation`.

    Args:
        limit: maximum number of questions a task.
    """
    return tuple(
        Task(f"{split}/{kind}", OpenMojiAsked(kind, config, split, image_size, limit, seed, data_dir), ask, METRICS)
        for split in splits
        for kind in kinds_of(split)
    )


def openmoji_skills(
    config: str = "study", image_size: int = 64, limit: int = 200, seed: int = 0, data_dir: str | None = None
) -> tuple[Task, ...]:
    """Returns a task each for naming, positions, numbers and small text; see `mllm_jax.datasets.openmoji.skills`."""
    return tuple(
        Task(name, OpenMojiSkillsAsked(name, config, image_size, limit, seed, data_dir), ask, METRICS) for name in ASKED
    )


def openmoji_retrieval(
    config: str = "quickstart", splits: tuple[str, ...] = SPLITS, **settings: Any
) -> tuple[OpenMojiRetrieval, ...]:
    """Returns the searches of captions by images and of images by captions on each split."""
    return tuple(OpenMojiRetrieval(split, way, config, **settings) for split in splits for way in WAYS)


@dataclass(frozen=True)
class OpenMojiRetrieval:
    """Retrieval of captions by images or of images by captions; see `mllm_jax.datasets.openmoji.galleries`.

    Attributes:
        way: "image_to_text" or "text_to_image".
        ways: number of images and captions in the gallery.
    """

    split: str
    way: str
    config: str = "quickstart"
    image_size: int = 64
    ways: int = 300
    seed: int = 0
    data_dir: str | None = None

    def __post_init__(self):
        if self.way not in WAYS:
            raise ConfigError(f"OpenMojiRetrieval: way {self.way!r}", f"one of {', '.join(WAYS)}", "change the way")

    @property
    def name(self) -> str:
        return f"{self.split}/{self.way}"

    def check(self, model: Any) -> None:
        """Raises ConfigError: a model that is no dual encoder."""
        if not isinstance(model, DualEncoderConfig):
            raise ConfigError(
                f"OpenMojiRetrieval of a {type(model).__name__}",
                "a dual encoder, which compares images and texts",
                "change the evaluation",
            )

    def measure(self, assistant: Assistant, *, limit: int | None = None, batch_size: int = BATCH) -> Measured:
        """Implements `mllm_jax.evaluation.task.Evaluation`."""
        settings = (self.config, self.split, self.image_size, self.ways, self.seed, self.data_dir)
        gallery = next(gallery for gallery in galleries(*settings) if gallery.task == self.way)
        return search(assistant, gallery, limit)
