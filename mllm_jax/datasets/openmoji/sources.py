"""Sources of conversations about emoji: each example is a function of the source's settings and its index.

A frozen dataclass configures each source; `build()` reads the data and returns a `Source`.
They share these settings:

    config: "quickstart", "study" or "full"; split: "train", "validation", "composition" or "unseen";
    image_size: in pixels; seed: selects the questions; augment: shifts and shrinks each image slightly;
    per_base: a base with fewer forms is repeated up to this number, so that persons with their 18 forms do not
    dominate (1: each image equally often); data_dir: see `records.load`.
"""

from __future__ import annotations

import functools
import hashlib
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import numpy as np

from mllm_jax.data.message import Example
from mllm_jax.datasets.openmoji.catalog import Catalog, Dice, catalog
from mllm_jax.datasets.openmoji.images import EmojiImages
from mllm_jax.datasets.openmoji.pairs import Group, compose_group, group_turns
from mllm_jax.datasets.openmoji.questions import ASKED as ASKED_OF_IMAGES
from mllm_jax.datasets.openmoji.questions import caption, image_turns
from mllm_jax.datasets.openmoji.scenes import ASKED as ASKED_OF_SCENES
from mllm_jax.datasets.openmoji.scenes import PLACES, Scene, compose_scene, scene_caption, scene_turns
from mllm_jax.datasets.openmoji.turns import asked, captioned
from mllm_jax.errors import ConfigError

QUESTIONS_VERSION = 16  # increase it whenever the questions, the answers or the drawing of images change
_AUGMENT, _ENDING = 1, 2  # last part of a random stream's seed: 0 draws the text, 1 the image, 2 a caption's end
PER_BASE = 3  # default of `per_base`; the evaluation draws its scenes with it

_RANGES = {
    "image_size": (8, 4096),
    "per_base": (1, 1000),
    "seed": (0, 2**63),
    "variants": (1, 2**31),
    "size": (1, 2**31),
    "grid": (min(PLACES), max(PLACES)),
    "scene_share": (0, 1),
    "category_share": (0, 1),
    "draw_share": (0, 1),
    "read_share": (0, 1),
    "naming_last": (0, 1),
    "turns": (1, 64),
}


@dataclass(frozen=True)
class SourceSettings:
    config: str = "quickstart"
    split: str = "train"
    image_size: int = 64
    seed: int = 0
    augment: bool = False
    per_base: int = PER_BASE
    data_dir: str | None = None

    def check(self) -> None:
        """Raises ConfigError for a setting out of its range."""
        for name, (least, most) in _RANGES.items():
            value = getattr(self, name, least)
            if value is not None and not least <= value <= most:
                raise ConfigError(
                    f"{type(self).__name__}: {name}={value}", f"{least} to {most}", "correct the setting in the config"
                )
        unknown = set(getattr(self, "tasks", ())) - set(ASKED_OF_IMAGES) - set(ASKED_OF_SCENES)
        if unknown:
            known = ", ".join([*ASKED_OF_IMAGES, *ASKED_OF_SCENES])
            raise ConfigError(f"{type(self).__name__}: tasks {sorted(unknown)}", f"some of {known}", "correct them")


@dataclass(frozen=True)
class OpenMojiQuestions(SourceSettings):
    """One image and three to five questions of different tasks; index = scheduled image * variants + variant.

    `tasks` selects some of them ("naming", "yes_no", ...), and `turns` sets their number.
    """

    variants: int = 8
    naming_last: float = 0.5
    tasks: tuple[str, ...] = ()
    turns: int | None = None

    def build(self) -> _Questions:
        return _Questions(self)


@dataclass(frozen=True)
class OpenMojiScenes(SourceSettings):
    """An image with a grid of emoji and three to five questions about positions, numbers and presence.

    `tasks` selects some of them ("scene_position", "scene_count", "scene_exists"), and `turns` sets their number.
    """

    grid: int = 2
    size: int = 20_000
    tasks: tuple[str, ...] = ()
    turns: int | None = None

    def build(self) -> _Scenes:
        return _Scenes(self)


@dataclass(frozen=True)
class OpenMojiPairs(SourceSettings):
    """Two or three images in one conversation, and questions that compare them."""

    size: int = 10_000

    def build(self) -> _Pairs:
        return _Pairs(self)


@dataclass(frozen=True)
class OpenMojiCaptions(SourceSettings):
    """One image and its caption, for contrastive training; a `scene_share` of the images are 2 x 2 scenes.

    A scene has a caption for each of its cells, so the encoder must have as many regions. With a `category_share`, a
    caption ends in the image's category, which an unseen base may share.

    Each variant lists every image once, with the forms of a base next to each other in random order. A mixture that
    keeps neighbours together then has hard negatives.
    """

    variants: int = 8
    scene_share: float = 0.0
    category_share: float = 0.0

    def build(self) -> _Captions:
        return _Captions(self)


@dataclass(frozen=True)
class OpenMojiText(SourceSettings):
    """The questions of the other sources about a description in words; there are no images."""

    variants: int = 8
    scene_share: float = 0.3
    naming_last: float = 0.5
    tasks: tuple[str, ...] = ()
    turns: int | None = None

    def build(self) -> _Text:
        return _Text(self)


class EmojiSource:
    """The base of all sources: catalog, a schedule that balances the bases, random streams and the fingerprint."""

    name: str
    stream: int

    def __init__(self, settings: Any):
        settings.check()
        self.settings = settings
        self.catalog: Catalog = catalog(settings.config, settings.split, settings.data_dir)
        self.schedule = self.catalog.schedule(settings.per_base)
        self.emoji_images = EmojiImages(self.catalog)

    def __len__(self) -> int:
        return len(self.schedule) * self.settings.variants

    def fingerprint(self) -> str:
        """Returns a hash of the records, the settings (without the data folder) and the version of the questions."""
        settings = {key: value for key, value in asdict(self.settings).items() if key != "data_dir"}
        parts = (self.name, QUESTIONS_VERSION, sorted(settings.items()), self.catalog.digest)
        return hashlib.sha256(repr(parts).encode()).hexdigest()[:16]

    def _dice(self, index: int, purpose: int = 0) -> Dice:
        if not 0 <= index < len(self):  # type: ignore[arg-type]
            raise IndexError(f"index {index} of source {self.name}, which has {len(self)} examples")
        return Dice(self.settings.seed, self.stream, index, purpose)

    def _augment(self, index: int) -> Dice | None:
        return self._dice(index, _AUGMENT) if self.settings.augment else None


class _Questions(EmojiSource):
    name = "openmoji_questions"
    stream = 1

    def record_index(self, index: int) -> int:
        """Returns the index of the record that example `index` shows."""
        return self.schedule[index // self.settings.variants]

    def example(self, index: int) -> Example:
        dice = self._dice(index)
        s = self.settings
        count = s.turns or 3 + dice.below(3)
        turns = image_turns(self.catalog, dice, self.record_index(index), count, s.naming_last, s.tasks)
        return asked(turns, [lambda: self.image(index)])

    def image(self, index: int) -> np.ndarray:
        return self.emoji_images.single(self.record_index(index), self.settings.image_size, self._augment(index))


class _Scenes(EmojiSource):
    def __init__(self, settings: OpenMojiScenes):
        super().__init__(settings)
        self.name = f"openmoji_scenes{settings.grid}"
        self.stream = 10 * settings.grid  # so that 2 x 2 and 3 x 3 scenes of one index have nothing in common

    def __len__(self) -> int:
        return self.settings.size

    def scene(self, index: int, dice: Dice | None = None) -> Scene:
        """Composes the scene of example `index`."""
        return compose_scene(self.catalog, dice or self._dice(index), self.settings.grid, self.schedule)

    def example(self, index: int) -> Example:
        dice = self._dice(index)
        scene = self.scene(index, dice)
        count = self.settings.turns or 3 + dice.below(3)
        return asked(scene_turns(self.catalog, dice, scene, count, self.settings.tasks), [lambda: self.image(index)])

    def image(self, index: int) -> np.ndarray:
        return self.emoji_images.scene(self.scene(index), self.settings.image_size, self._augment(index))


class _Pairs(EmojiSource):
    name = "openmoji_pairs"
    stream = 3

    def __len__(self) -> int:
        return self.settings.size

    def group(self, index: int, dice: Dice | None = None) -> Group:
        """Composes the group of example `index`."""
        return compose_group(self.catalog, dice or self._dice(index), self.schedule)

    def example(self, index: int) -> Example:
        dice = self._dice(index)
        group = self.group(index, dice)
        draw = [partial(self._image, index, number) for number in range(len(group.members))]
        return asked(group_turns(self.catalog, dice, group), draw)

    def images(self, index: int) -> list[np.ndarray]:
        """Returns all images of an example, which share one random stream."""
        dice = self._augment(index)
        return [self.emoji_images.single(one, self.settings.image_size, dice) for one in self.group(index).members]

    def _image(self, index: int, number: int) -> np.ndarray:
        return self.images(index)[number]


class _Captions(EmojiSource):
    name = "openmoji_captions"
    stream = 4

    def __init__(self, settings: OpenMojiCaptions):
        super().__init__(settings)
        self._order = functools.lru_cache(maxsize=settings.variants)(self._ordered)

    def __len__(self) -> int:
        return len(self.catalog.records) * self.settings.variants

    def _ordered(self, variant: int) -> list[int]:
        """Returns all records, base by base; bases and their forms are in a random order of this variant."""
        rng = np.random.default_rng((self.settings.seed, self.stream, variant))
        bases = list(self.catalog.by_base.values())
        return [
            forms[j] for i in rng.permutation(len(bases)) for forms in [bases[i]] for j in rng.permutation(len(forms))
        ]

    def _shown(self, index: int) -> int | Scene:
        dice = self._dice(index)
        if dice.chance(self.settings.scene_share):
            return compose_scene(self.catalog, dice, 2, self.schedule)
        variant, place = divmod(index, len(self.catalog.records))
        return self._order(variant)[place]

    def example(self, index: int) -> Example:
        shown, dice = self._shown(index), self._dice(index, _ENDING)
        scene = isinstance(shown, Scene)
        cells = shown.cells if scene else (shown,)
        captions = [self._caption(cell, dice) for cell in cells]
        return captioned(captions, lambda: self.image(index), regions=scene)

    def image(self, index: int) -> np.ndarray:
        shown, size, dice = self._shown(index), self.settings.image_size, self._augment(index)
        draw = self.emoji_images.scene if isinstance(shown, Scene) else self.emoji_images.single
        return draw(shown, size, dice)  # type: ignore[arg-type]

    def _caption(self, record: int, dice: Dice) -> str:
        words = caption(self.catalog, record)
        with_category = dice.chance(self.settings.category_share)
        return f"{words} {self.catalog.records[record].category}" if with_category else words


class _Text(EmojiSource):
    name = "openmoji_text"
    stream = 5

    def example(self, index: int) -> Example:
        dice = self._dice(index)
        s = self.settings
        count = s.turns or 3 + dice.below(3)
        if dice.chance(s.scene_share):
            scene = compose_scene(self.catalog, dice, 2, self.schedule)
            turns = scene_turns(self.catalog, dice, scene, count, s.tasks)
            context = scene_caption(self.catalog, scene)
        else:
            record = self.schedule[index // self.settings.variants]
            turns = image_turns(self.catalog, dice, record, count, s.naming_last, s.tasks)
            context = caption(self.catalog, record)
        return asked(turns, context=context)
