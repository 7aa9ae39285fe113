"""The tasks that evaluate a model which draws emoji: what its images show, and whether it draws when asked."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from mllm_jax.checkpoints.run import is_run
from mllm_jax.data.message import Conversation, Example, Image, Message
from mllm_jax.datasets.openmoji.catalog import Dice
from mllm_jax.datasets.openmoji.compositions import KINDS, Composition, Compositions, compositions
from mllm_jax.datasets.openmoji.images import EmojiImages, grid_cells
from mllm_jax.datasets.openmoji.questions import caption
from mllm_jax.datasets.openmoji.requests import DRAW, OpenMojiRequests, draw
from mllm_jax.errors import ConfigError, TooFewError
from mllm_jax.evaluation.drawn import (
    EMPTY,
    Classifier,
    Names,
    contact_sheet,
    draws_if_asked,
    draws_when_asked,
    frechet_distance,
    pixels,
    writes_when_not_asked,
)
from mllm_jax.evaluation.metrics import count, shuffles
from mllm_jax.evaluation.task import Task
from mllm_jax.evaluation.tasks.openmoji import METRICS
from mllm_jax.generation.assistant import Assistant
from mllm_jax.generation.options import Answer
from mllm_jax.models.protocol import produced
from mllm_jax.training.evaluation import BATCH, Measured, Prediction

CLASSIFIER = "runs/clip_openmoji"
_TRAINS = "mllm train configs/clip_openmoji.py"
_STREAM = 301  # different from the streams of sources, questions and compositions
ASKED = {
    "accuracy": draws_if_asked,
    "accuracy_when_asked": draws_when_asked,
    "accuracy_when_not_asked": writes_when_not_asked,
    "n": count,
}


def openmoji_drawn(
    config: str = "tones",
    classifier: str = CLASSIFIER,
    image_size: int = 32,
    limit: int = 300,
    scenes: int = 100,
    steps: int = 25,
    guidance_scale: float = 3.0,
    seed: int = 0,
    data_dir: str | None = None,
) -> tuple[Any, ...]:
    """Returns the tasks of a model that draws, on held-out compositions and wordings of requests.

    "drawn/single", "drawn/two", "drawn/position" and "drawn/count" name the drawn images, see `OpenMojiDrawn`.
    "requests/drawing" measures whether the model draws if it is asked to, and otherwise answers in text;
    "requests/reading" and "requests/text" whether its answers about images and about words are right.

    Args:
        limit: of the images of single emoji, and of the requests.
        scenes: images of each other kind.
        steps, guidance_scale: of the generator; for the requests it takes a single step, as nobody looks at the images.
    """
    settings = dict(config=config, image_size=image_size, data_dir=data_dir)
    how = dict(classifier=classifier, steps=steps, guidance_scale=guidance_scale, seed=seed)
    requests = OpenMojiRequests(**settings, split="composition", wordings="held_out", seed=seed, size=limit)
    quick = {"drawing": {"steps": 1, "guidance_scale": 1.0}}
    reading, text = (replace(requests, draw_share=0.0, read_share=share) for share in (1.0, 0.0))
    return (
        *(OpenMojiDrawn(kind, limit=limit if kind == "single" else scenes, **settings, **how) for kind in KINDS),
        Task("requests/drawing", requests, asked, ASKED, max_new_tokens=64, options=quick),
        Task("requests/reading", reading, asked, METRICS, options=quick),
        Task("requests/text", text, asked, {name: METRICS[name] for name in ("accuracy", "n")}, options=quick),
    )


def asked(example: Example) -> Conversation:
    """Returns an example without its answer."""
    return example.messages[:-1]


@dataclass(frozen=True)
class OpenMojiDrawn:
    """Images of held-out compositions that a model draws, named by an independently trained classifier.

    The checks are those of GenEval (arXiv 2310.11513), with a classifier in place of a detector. It names a single
    emoji among all names of the data set, and each cell of a scene among the names of things in scenes and "empty".

    - "single": "accuracy", the name is right, gender and skin tone included; "accuracy_object", its base is; and
      "accuracy_tone", the skin tone of an emoji that has one is.
    - "two": both objects are there, in any order.
    - "position": every cell is right, the empty ones included.
    - "count": the object is there as often as asked for, and nothing else.
    - "accuracy_cells": the share of cells of scenes that are right.

    "accuracy_shuffled_media" are the same images under the captions of others (chance), and "accuracy_real" real
    images under their own captions (ceiling). "frechet_distance" is that of drawn and real images, and
    "frechet_distance_real" that of other real images of this kind, see `frechet_distance`.

    Attributes:
        kind: "single", "two", "position" or "count".
        classifier: folder of the run of configs/clip_openmoji.py.
        limit: images; where there are fewer compositions, they are drawn again from other noise.
        steps, guidance_scale: of the generator.
        max_new_tokens: of the answer with the image.
    """

    kind: str
    config: str = "tones"
    split: str = "composition"
    classifier: str = CLASSIFIER
    image_size: int = 32
    limit: int = 300
    steps: int = 25
    guidance_scale: float = 3.0
    wordings: str = "held_out"
    max_new_tokens: int = 64
    seed: int = 0
    data_dir: str | None = None

    def __post_init__(self):
        if self.kind not in KINDS or self.wordings not in DRAW or self.limit < 2:
            raise ConfigError(
                f"OpenMojiDrawn: kind {self.kind!r}, wordings {self.wordings!r}, limit {self.limit}",
                f"one of {', '.join(KINDS)}; one of {', '.join(DRAW)}; at least 2",
                "change it",
            )

    @property
    def name(self) -> str:
        return f"drawn/{self.kind}"

    def check(self, model: Any) -> None:
        """Raises ConfigError: a model that produces no images."""
        if "image" not in produced(model):
            raise ConfigError(
                f"{type(self).__name__} of a {type(model).__name__} that produces no images",
                'a model with outputs={"image": ...}',
                "change the evaluation",
            )

    def measure(self, assistant: Assistant, *, limit: int | None = None, batch_size: int = BATCH) -> Measured:
        """Implements `mllm_jax.training.evaluation.Evaluation`.

        Raises:
            TooFewError: there is no classifier, or a limit below 2.
        """
        number = min(self.limit, limit or self.limit)
        if number < 2:
            raise TooFewError(f"{self.name} of {number} image", "at least two, for chance", "raise the limit")
        judge = load_classifier(self.classifier)
        known = compositions(self.config, self.split, self.data_dir)
        shown = known.asked(self.kind, number, self.seed)
        prompts = self.prompts(shown)
        answers = assistant.generate(
            [[Message("user", prompt)] for prompt in prompts],
            batch_size=batch_size,
            max_new_tokens=self.max_new_tokens,
            seed=self.seed,
            produce=("image",),
            drawing=dict(steps=self.steps, guidance_scale=self.guidance_scale),
        )
        return self.judged(judge, known, shown, prompts, answers)

    def prompts(self, shown: Sequence[Composition]) -> list[str]:
        """Returns a request to draw for each composition."""
        dice = Dice(self.seed, _STREAM)
        return [dice.pick(DRAW[self.wordings]).format(x=each.caption) for each in shown]

    def judged(
        self,
        judge: Classifier,
        known: Compositions,
        shown: Sequence[Composition],
        prompts: Sequence[str],
        answers: Sequence[Answer],
    ) -> Measured:
        """Names the images of answers and compares the names with what was asked for."""
        images, size = EmojiImages(known.catalog), self.image_size
        real = [draw(images, each, size) for each in shown]
        drawn = [pixels(answer, size) for answer in answers]
        others = [draw(images, each, size) for each in known.asked(self.kind, len(shown), self.seed + 1)]
        found, of_real = (self._named(judge, known, images, each, shown) for each in (drawn, real))
        rights = [self._checks(known, *pair) for pair in zip(shown, found, strict=True)]
        first = [right["accuracy"] for right in rights]
        orders = shuffles(len(shown))
        chance = [self._right(known, shown[i], found[j]) for order in orders for i, j in enumerate(order)]
        vectors = {name: judge.embed(images=each) for name, each in dict(drawn=drawn, real=real, others=others).items()}
        ceiling = [self._right(known, *pair) for pair in zip(shown, of_real, strict=True)]
        metrics = {
            "accuracy": float(np.mean(first)),
            "accuracy_shuffled_media": float(np.mean(chance)),
            "accuracy_real": float(np.mean(ceiling)),
        }
        for name in dict.fromkeys(name for right in rights for name in right):
            metrics[name] = float(np.mean([right[name] for right in rights if name in right]))
        metrics |= {
            "frechet_distance": frechet_distance(vectors["drawn"], vectors["real"]),
            "frechet_distance_real": frechet_distance(vectors["others"], vectors["real"]),
            "n": len(shown),
            "compositions": len({each.caption for each in shown}),
            "without_image": sum(not answer.media for answer in answers),
        }
        sheet = Prediction(
            "sheet", f"{self.name}: drawn, and real", (Image(contact_sheet(drawn, real)),), "", None, None
        )
        pairs = zip(prompts, drawn, real, found, shown, first, strict=True)
        return Measured(metrics, [sheet, *(self._prediction(known, i, *each) for i, each in enumerate(pairs))])

    def _named(
        self,
        judge: Classifier,
        known: Compositions,
        images: EmojiImages,
        pictures: Sequence[np.ndarray],
        shown: Sequence[Composition],
    ) -> list[tuple[str, ...]]:
        """Returns the names of the cells of each image, in reading order."""
        if self.kind == "single":
            return [(name,) for name in Names(judge, known.names()).of(pictures)]
        cell = self.image_size // 2
        names = Names(judge, known.names(tones=False), [images.single(index, cell) for index in known.things])
        boxes = [grid_cells(len(image), each.rows, each.columns) for image, each in zip(pictures, shown, strict=True)]
        crops = [
            image[top : top + side, left : left + side]
            for image, own in zip(pictures, boxes, strict=True)
            for top, left, side in own
        ]
        said = iter(names.of(crops))
        return [tuple(next(said) for _ in own) for own in boxes]

    def _right(self, known: Compositions, wanted: Composition, found: tuple[str, ...]) -> float:
        names = wanted_names(known, wanted)
        anywhere = self.kind in ("two", "count")
        return float(sorted(names) == sorted(found) if anywhere else names == found)

    def _checks(self, known: Compositions, wanted: Composition, found: tuple[str, ...]) -> dict[str, float]:
        checks = {"accuracy": self._right(known, wanted, found)}
        names = wanted_names(known, wanted)
        if self.kind != "single":
            return checks | {"accuracy_cells": float(np.mean([a == b for a, b in zip(names, found, strict=True)]))}
        said, own = (known.named(name) for name in (found[0], names[0]))
        checks["accuracy_object"] = float(said.base == own.base)
        return checks | ({"accuracy_tone": float(said.skin_tone == own.skin_tone)} if own.skin_tone else {})

    def _prediction(self, known, index, prompt, drawn, real, found, wanted, right) -> Prediction:
        said, reference = (", ".join(names) for names in (found, wanted_names(known, wanted)))
        return Prediction(index, prompt, (Image(drawn), Image(real)), said, reference, bool(right))


def wanted_names(known: Compositions, shown: Composition) -> tuple[str, ...]:
    """Returns the names of the cells of a composition, in reading order."""
    return tuple(EMPTY if cell is None else caption(known.catalog, cell) for cell in shown.cells)


@functools.lru_cache(maxsize=1)
def load_classifier(folder: str) -> Assistant:
    """Loads the classifier of a run, once for all tasks. Raises TooFewError: there is no run that has trained."""
    if not is_run(Path(folder)):
        raise TooFewError(f"{folder}: no classifier to name drawn images", "the folder of its run", f"run: {_TRAINS}")
    return Assistant.load(folder)
