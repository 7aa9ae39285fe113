"""One skill at a time, for comparing parts of a model: naming, positions, numbers and small written text.

There are few bases and the answers are short, so that the projector limits the accuracy.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import numpy as np

from mllm_jax.data.images import resize
from mllm_jax.data.message import Example
from mllm_jax.datasets.openmoji.catalog import Catalog, Dice, catalog
from mllm_jax.datasets.openmoji.evaluation import EvalQuestion
from mllm_jax.datasets.openmoji.images import EmojiImages
from mllm_jax.datasets.openmoji.questions import ASKED as ASKED_OF_IMAGES
from mllm_jax.datasets.openmoji.questions import caption
from mllm_jax.datasets.openmoji.scenes import ASKED as ASKED_OF_SCENES
from mllm_jax.datasets.openmoji.scenes import PLACES, Scene, compose_scene, count_of, position, scene_caption
from mllm_jax.datasets.openmoji.sources import EmojiSource, SourceSettings
from mllm_jax.datasets.openmoji.turns import Turn, asked, captioned
from mllm_jax.errors import ConfigError, TooFewError

SKILLS = ("naming", "place", "number", "text")
ASKED = ("composition/naming", "new/number", "new/text", "new/top_left")  # split and task of `skill_questions`
FORMS = ("images", "captions", "text")
READING = ("Which number is written here?", "What number do you read?", "Read the number.")
PEOPLE = (
    *("teacher", "cook", "artist", "astronaut", "mage", "vampire", "superhero", "scientist", "pilot", "elf"),
    *("fairy", "student", "singer", "detective", "mechanic", "guard"),
)
THINGS = (
    *("cat", "fox", "lion", "elephant", "penguin", "frog", "snake", "octopus", "butterfly", "snail"),
    *("red apple", "banana", "lemon", "grapes", "carrot", "pizza", "hamburger", "bread"),
    *("guitar", "camera", "key", "violin", "laptop", "house", "castle", "bus", "bicycle", "rocket", "airplane"),
    *("sun", "star", "umbrella", "pile of poo", "robot", "ghost", "red heart"),
)
_STREAM, _EVALUATION = 7, 107
_LETTER = 0.25  # height of the digits as a share of the image's height
_IMAGE = 0.62  # side of the emoji as a share of the image's


@dataclass(frozen=True)
class Sign:
    """An emoji and a number from 10 to 99: the record, the number, and the corner (row, column) of the number."""

    record: int
    number: int
    row: int
    column: int


@dataclass(frozen=True)
class OpenMojiSkills(SourceSettings):
    """Examples of some skills in turn, one an image.

    Attributes:
        skills: "naming" of a single image, "place" and "number" of 2 x 2 scenes of things, "text" of an emoji with a
            small number written in a corner.
        form: "images" gives questions about images; "captions" gives an image and its words, for contrastive training;
            "text" describes the image in words, for the LLM.
    """

    config: str = "study"
    skills: tuple[str, ...] = SKILLS
    form: str = "images"
    size: int = 40_000

    def check(self) -> None:
        super().check()
        if self.form not in FORMS or not self.skills or not set(self.skills) <= set(SKILLS):
            raise ConfigError(
                f"OpenMojiSkills: form {self.form!r}, skills {self.skills}",
                f"one of {', '.join(FORMS)}, and some of {', '.join(SKILLS)}",
                "correct the config",
            )

    def build(self) -> _Skills:
        return _Skills(self)


class _Skills(EmojiSource):
    stream = _STREAM

    def __init__(self, settings: OpenMojiSkills):
        settings.check()
        self.settings = settings
        self.name = f"openmoji_skills_{settings.form}"
        self.catalog = _restricted(settings.config, settings.split, settings.data_dir)
        self.emoji_images = EmojiImages(self.catalog)
        self.singles = self.catalog.schedule(settings.per_base)
        self.things = _things(self.catalog)

    def __len__(self) -> int:
        return self.settings.size

    def _shown(self, index: int) -> tuple[str, int | Scene | Sign, Dice]:
        """Returns the skill, what the image shows, and the dice for the rest of the example."""
        dice = self._dice(index)
        skill = self.settings.skills[index % len(self.settings.skills)]
        if skill == "naming":
            return skill, dice.pick(self.singles), dice
        if skill == "text":
            return skill, draw_sign(self.things, dice), dice
        return skill, compose_scene(self.catalog, dice, 2, self.things), dice

    def example(self, index: int) -> Example:
        skill, shown, dice = self._shown(index)
        form = self.settings.form
        if form == "captions":
            return captioned([_words(self.catalog, shown)], lambda: self.image(index))
        turns = _turns(self.catalog, dice, skill, shown)
        if form == "images":
            return asked(turns, [lambda: self.image(index)])
        context = scene_caption(self.catalog, shown) if isinstance(shown, Scene) else _words(self.catalog, shown)
        return asked(turns, context=context)

    def image(self, index: int) -> np.ndarray:
        return _drawn(self.emoji_images, self._shown(index)[1], self.settings.image_size, self._augment(index))


@dataclass(frozen=True)
class OpenMojiSkillsAsked:
    """The questions of one skill.

    Attributes:
        name: one of ASKED.
    """

    name: str
    config: str = "study"
    image_size: int = 64
    limit: int = 200
    seed: int = 0
    data_dir: str | None = None

    def build(self) -> tuple[EvalQuestion, ...]:
        split, _, task = self.name.partition("/")
        found = _QUESTIONS[split](self.config, self.image_size, self.seed, self.limit, self.data_dir)
        return tuple(question for question in found if question.task == task)


def skill_questions(
    config: str = "study", image_size: int = 64, seed: int = 0, limit: int = 200, data_dir: str | None = None
) -> dict[str, list[EvalQuestion]]:
    """Returns {"composition": naming of unseen tones and genders, "new": scenes and signs of known things}.

    Pairs of thing and number on signs do not occur in training; a scene of four equal things may.

    Raises:
        DataError: no such config, or an image that cannot be decoded.
    """
    settings = (config, image_size, seed, limit, data_dir)
    return {split: list(questions(*settings)) for split, questions in _QUESTIONS.items()}


@functools.lru_cache(maxsize=2)
def _naming_questions(
    config: str, image_size: int, seed: int, limit: int, data_dir: str | None
) -> tuple[EvalQuestion, ...]:
    held = _restricted(config, "composition", data_dir)
    images = EmojiImages(held)
    order = list(held.all)
    Dice(seed, _EVALUATION).shuffle(order)
    return tuple(
        EvalQuestion(
            "naming",
            ASKED_OF_IMAGES["naming"][0],
            held.records[record].name,
            (images.single(record, image_size),),
            record,
        )
        for record in order[:limit]
    )


@functools.lru_cache(maxsize=2)
def _new_questions(
    config: str, image_size: int, seed: int, limit: int, data_dir: str | None
) -> tuple[EvalQuestion, ...]:
    known = _restricted(config, "train", data_dir)
    images, things, asked = EmojiImages(known), _things(known), []
    for number in range(limit):
        dice = Dice(seed, _EVALUATION, number)
        scene = compose_scene(known, dice, 2, things, count=number % 5)
        sign = draw_sign(things, dice, held_out=True)
        turns = {
            "top_left": (position(known, scene, 0, ASKED_OF_SCENES["scene_position"][0]), scene),
            "number": (count_of(known, scene, ASKED_OF_SCENES["scene_count"][0]), scene),
            "text": (Turn(READING[0], str(sign.number), "text"), sign),
        }
        for task, (turn, shown) in turns.items():
            record = shown.target if isinstance(shown, Scene) else shown.record
            asked.append(
                EvalQuestion(task, turn.question, turn.answer, (_drawn(images, shown, image_size, None),), record)
            )
    return tuple(sorted(asked, key=lambda question: question.task))


_QUESTIONS = {"composition": _naming_questions, "new": _new_questions}


def draw_sign(things: list[int], dice: Dice, held_out: bool = False) -> Sign:
    """Draws a thing and a number. A fifth of these pairs is held out: some of every thing and of every number."""
    while True:
        sign = Sign(dice.pick(things), 10 + dice.below(90), dice.below(2), dice.below(2))
        if ((7 * sign.number + sign.record) % 5 == 0) == held_out:
            return sign


def sign_image(images: EmojiImages, sign: Sign, size: int, dice: Dice | None = None) -> np.ndarray:
    """Returns uint8 [size, size, 3]: the emoji in the corner opposite to the number."""
    from PIL import Image, ImageDraw

    side = round(size * _IMAGE)
    canvas = np.full((size, size, 3), 255, np.uint8)
    top, left = (0 if corner else size - side for corner in (sign.row, sign.column))
    canvas[top : top + side, left : left + side] = resize(images.single(sign.record, size, dice), side)
    image = Image.fromarray(canvas)
    margin = round(0.03 * size)
    where = tuple(size - margin if corner else margin for corner in (sign.column, sign.row))
    anchor = ("r" if sign.column else "l") + ("b" if sign.row else "t")
    ImageDraw.Draw(image).text(
        where, str(sign.number), fill="black", font=_digits(round(size * _LETTER)), anchor=anchor
    )
    return np.asarray(image)


@functools.lru_cache(maxsize=4)
def _digits(height: int):
    from PIL import ImageFont

    return ImageFont.load_default(height)


def _restricted(config: str, split: str, data_dir: str | None) -> Catalog:
    """Returns the split's records of PEOPLE and THINGS."""
    whole = catalog(config, split, data_dir)
    records = [record for record in whole.records if record.base in {*PEOPLE, *THINGS}]
    if not records:
        raise TooFewError(f"{whole.where} without {', '.join(PEOPLE)} and things", "some", "choose another split")
    return Catalog(records, f"{whole.where}, some bases")


def _things(known: Catalog) -> list[int]:
    return [index for index in known.all if known.records[index].base in THINGS]


def _words(known: Catalog, shown: int | Scene | Sign) -> str:
    if isinstance(shown, Sign):
        return f"{caption(known, shown.record)} {shown.number}"
    cells = shown.cells if isinstance(shown, Scene) else (shown,)
    return " ".join(caption(known, cell) for cell in cells)


def _turns(known: Catalog, dice: Dice, skill: str, shown: int | Scene | Sign) -> tuple[Turn, ...]:
    if isinstance(shown, Sign):
        return (Turn(dice.pick(READING), str(shown.number), skill),)
    if isinstance(shown, int):
        return (Turn(dice.pick(ASKED_OF_IMAGES["naming"]), known.records[shown].name, skill),)
    if skill == "number":
        return (count_of(known, shown, dice.pick(ASKED_OF_SCENES["scene_count"])),)
    places = list(range(len(PLACES[2])))
    dice.shuffle(places)
    return tuple(position(known, shown, place, dice.pick(ASKED_OF_SCENES["scene_position"])) for place in places)


def _drawn(images: EmojiImages, shown: int | Scene | Sign, size: int, dice: Dice | None) -> np.ndarray:
    if isinstance(shown, Sign):
        return sign_image(images, shown, size, dice)
    return images.scene(shown, size, dice) if isinstance(shown, Scene) else images.single(shown, size, dice)
