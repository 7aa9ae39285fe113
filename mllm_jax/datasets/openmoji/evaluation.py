"""Fixed questions that measure a model on a split: the same list on every machine, with balanced answers."""

from __future__ import annotations

import functools
import zlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import numpy as np

from mllm_jax.datasets.openmoji.catalog import Catalog, Dice, catalog
from mllm_jax.datasets.openmoji.images import EmojiImages
from mllm_jax.datasets.openmoji.questions import ASKED as ASKED_OF_IMAGES
from mllm_jax.datasets.openmoji.questions import true_answers, yes_no
from mllm_jax.datasets.openmoji.scenes import ASKED as ASKED_OF_SCENES
from mllm_jax.datasets.openmoji.scenes import NUMBERS, PLACES, Scene, compose_scene, count_of, exists, position
from mllm_jax.datasets.openmoji.sources import PER_BASE
from mllm_jax.datasets.openmoji.turns import Turn

_STREAM = 100  # different from the streams of the training sources, so that no scene is a training scene
SINGLE = ("naming", "category", "subcategory", "skin_tone", "gender", "yes_no")
SCENES = (
    *("scene2_top_left", "scene2_count", "scene2_exists"),
    *("scene3_position", "scene3_count", "scene3_exists"),
)
_ONE_A_BASE = ("category", "subcategory")  # else most answers would be persons, who have 18 forms


@dataclass(frozen=True)
class EvalQuestion:
    """One question about `images` (uint8 [size, size, 3] each) and its one right answer.

    `record_index` is the record shown; for a scene, the record whose base is counted.
    """

    task: str
    question: str
    answer: str
    images: tuple[np.ndarray, ...]
    record_index: int


@dataclass(frozen=True)
class OpenMojiAsked:
    """The questions of one kind on a split; see `evaluation_questions`.

    Attributes:
        kind: one of `kinds_of(split)`.
    """

    kind: str
    config: str = "quickstart"
    split: str = "composition"
    image_size: int = 64
    limit: int = 200
    seed: int = 0
    data_dir: str | None = None

    def build(self) -> tuple[EvalQuestion, ...]:
        settings = (self.config, self.split, self.image_size, self.seed, self.limit, self.data_dir)
        return tuple(question for question in _questions(*settings) if question.task == self.kind)


def kinds_of(split: str) -> tuple[str, ...]:
    """Returns the kinds of questions on a split; no category where most of the split is persons."""
    return tuple(kind for kind in (*SINGLE, *SCENES) if kind != "category" or split == "unseen")


def evaluation_questions(
    config: str = "quickstart",
    split: str = "composition",
    image_size: int = 64,
    seed: int = 0,
    limit: int = 300,
    data_dir: str | None = None,
) -> list[EvalQuestion]:
    """Returns all questions on a split, at most `limit` of each task, grouped by task.

    naming, yes_no (each image once with "yes", once with "no"), category and subcategory (one form of each base),
    skin_tone and gender; scene2_top_left, scene2_count (zero to four equally often), scene2_exists (half "yes"), and
    scene3_position, scene3_count, scene3_exists. On `unseen`, every task takes one form of each base; skin_tone and
    gender take one of each base and answer. Scenes consist of the split's own images. Splits other than `unseen` have
    no category; see `kinds_of`.

    Raises:
        DataError: no such config or split, or an image that cannot be decoded.
    """
    known = catalog(config, split, data_dir)
    images = EmojiImages(known)
    singles = _single_turns(known, one_form=split == "unseen", seed=seed, limit=limit)
    questions = [
        EvalQuestion(turn.task, turn.question, turn.answer, (images.single(index, image_size),), index)
        for index, turn in singles
    ]
    schedule = _first_of_each(known.all, lambda index: known.records[index].base)
    if split != "unseen":
        schedule = known.schedule(PER_BASE)
    for grid in PLACES:
        for scene, turns in _scenes(known, grid, schedule, seed, limit):
            image = images.scene(scene, image_size)
            questions += [EvalQuestion(t.task, t.question, t.answer, (image,), scene.target) for t in turns]
    order = {kind: place for place, kind in enumerate(kinds_of(split))}
    return sorted((one for one in questions if one.task in order), key=lambda one: order[one.task])


@functools.lru_cache(maxsize=4)
def _questions(*settings) -> tuple[EvalQuestion, ...]:
    """Builds the questions of all tasks of a split, which share its images."""
    return tuple(evaluation_questions(*settings))


def _single_turns(known: Catalog, one_form: bool, seed: int, limit: int) -> Iterable[tuple[int, Turn]]:
    shuffled = sorted(known.all, key=lambda index: _mixed(known.records[index].codepoints, seed))
    # In the order of bases: in the order of forms, bases with many forms would come first and fill the limit.
    one_a_base = sorted(
        _first_of_each(shuffled, lambda index: known.records[index].base),
        key=lambda index: _mixed(known.records[index].base, seed),
    )
    for task in ("naming", "category", "subcategory", "skin_tone", "gender"):
        chosen = one_a_base if one_form or task in _ONE_A_BASE else shuffled
        if one_form and task in ("skin_tone", "gender"):
            chosen = _first_of_each(
                shuffled, lambda index, task=task: (known.records[index].base, getattr(known.records[index], task))
            )
        chosen = [index for index in chosen if task in true_answers(known.records[index])]
        for index in chosen[:limit]:
            yield index, Turn(ASKED_OF_IMAGES[task][0], true_answers(known.records[index])[task], task)
    for index in (one_a_base if one_form else shuffled)[: limit // 2]:
        turns = [
            yes_no(known, Dice(seed, _STREAM, index, int(truth)), index, truth, ASKED_OF_IMAGES["yes_no"][0])
            for truth in (True, False)
        ]
        if None not in turns:
            yield from ((index, turn) for turn in turns if turn is not None)


def _scenes(
    known: Catalog, grid: int, schedule: list[int], seed: int, limit: int
) -> Iterable[tuple[Scene, list[Turn]]]:
    for number in range(limit):
        dice = Dice(seed, _STREAM + grid, number)
        scene = compose_scene(known, dice, grid, schedule, count=number % len(NUMBERS))
        # Presence changes once a cycle of the counts, so that it says nothing about the count.
        truth = (number // len(NUMBERS)) % 2 == 0
        cell = 0 if grid == 2 else number % (grid * grid)
        turns = [
            position(known, scene, cell, ASKED_OF_SCENES["scene_position"][0]),
            count_of(known, scene, ASKED_OF_SCENES["scene_count"][0]),
            exists(known, dice, scene, truth, ASKED_OF_SCENES["scene_exists"][0]),
        ]
        names = (f"scene{grid}_{'top_left' if grid == 2 else 'position'}", f"scene{grid}_count", f"scene{grid}_exists")
        yield (
            scene,
            [
                Turn(turn.question, turn.answer, name)
                for turn, name in zip(turns, names, strict=True)
                if turn is not None
            ],
        )


def _first_of_each(indices: list[int], key: Callable[[int], object]) -> list[int]:
    first: dict[object, int] = {}
    for index in indices:
        first.setdefault(key(index), index)
    return list(first.values())


def _mixed(key: str, seed: int) -> tuple[int, str]:
    """Returns a sort key that gives the same arbitrary order on every machine."""
    return zlib.crc32(f"{seed}:{key}".encode()), key
