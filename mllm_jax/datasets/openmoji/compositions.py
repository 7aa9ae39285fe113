"""Compositions to draw: single emoji and small scenes in words, some of which are held out of training."""

from __future__ import annotations

import functools
from collections import defaultdict
from dataclasses import dataclass

from mllm_jax.datasets.held_out import stable_hash
from mllm_jax.datasets.openmoji.catalog import FULL, Catalog, Dice, catalog
from mllm_jax.datasets.openmoji.pairs import clearly_different
from mllm_jax.datasets.openmoji.questions import caption, with_article
from mllm_jax.datasets.openmoji.records import CONFIGS, Record
from mllm_jax.datasets.openmoji.scenes import NUMBERS, PLACES
from mllm_jax.datasets.openmoji.skills import THINGS
from mllm_jax.errors import ConfigError, TooFewError

KINDS = ("single", "two", "position", "count")
SPLITS = ("train", "composition")
SUBSETS = ("tones", *CONFIGS)  # "tones": emoji with skin tones that have no gender, and things
HELD_TONES = 0.3  # share of the tones of a base
HELD_SCENES = 5  # one in five pairs of emoji, and one in five pairs of emoji and number
_ATTEMPTS = 500
_EVALUATION = 300  # different from the streams of sources, questions and galleries


@dataclass(frozen=True)
class Composition:
    """An image in words.

    Attributes:
        kind: "single", one emoji in the whole image; "two", next to each other; "position", two, each at a named
            position; "count", one emoji two to four times, from the top left on.
        caption: such as "a cat to the left of a fox".
        rows, columns: of the grid, see `grid_cells`.
        cells: record indices in reading order, None for an empty cell.
    """

    kind: str
    caption: str
    rows: int
    columns: int
    cells: tuple[int | None, ...]


class Compositions:
    """The compositions of a split; `compositions()` builds it.

    A single emoji of the split "composition" has a base and a skin tone that training has only apart, or with genders
    is of the data's own split of this name. Its scenes have a pair of emoji, or an emoji and a number, that training
    has only apart. Scenes consist of emoji without skin tones.
    """

    def __init__(self, known: Catalog, held: frozenset[int], split: str):
        self.catalog, self.held, self.split = known, held, split
        wanted = [index for index in known.all if (index in held) == (split == "composition")]
        self.singles = wanted
        self.things = [index for index in known.all if not known.records[index].skin_tone and index not in held]
        if not wanted or len(self.things) < 2:
            raise TooFewError(
                f"{known.where} with {len(wanted)} single emoji and {len(self.things)} for scenes",
                "at least one, and two",
                "choose another config or split",
            )

    def names(self, tones: bool = True) -> tuple[str, ...]:
        """Returns the names of all that is shown, in both splits; without `tones`, in the cells of scenes."""
        indices = self.catalog.all if tones else self.things
        return tuple(dict.fromkeys(caption(self.catalog, index) for index in indices))

    def named(self, name: str) -> Record:
        """Returns the first record of a name of `names`."""
        return next(self.catalog.records[index] for index in self.catalog.all if caption(self.catalog, index) == name)

    def compose(self, dice: Dice, kind: str, singles: list[int]) -> Composition:
        """Draws a composition of a kind.

        Args:
            singles: record indices of single emoji to draw from.

        Raises:
            TooFewError: no scene of the split was found.
        """
        if kind == "single":
            return self.single(dice.pick(singles))
        for _ in range(_ATTEMPTS):
            found = self._count(dice) if kind == "count" else self._two(dice, kind == "position")
            if found is not None:
                return found
        raise TooFewError(
            f"{self.catalog.where}: no composition of kind {kind!r} for split {self.split!r}",
            "one in five pairs and numbers is held out",
            "choose a larger config",
        )

    def single(self, index: int) -> Composition:
        """Returns one emoji in the whole image."""
        return Composition("single", self._words(index), 1, 1, (index,))

    def _words(self, index: int) -> str:
        return with_article(self.catalog.claims[index][FULL].text)

    def _fits(self, key: str) -> bool:
        return (stable_hash(f"openmoji:composition:{key}") % HELD_SCENES == 0) == (self.split == "composition")

    def _count(self, dice: Dice) -> Composition | None:
        index, number = dice.pick(self.things), 2 + dice.below(3)
        if not self._fits(f"{self.catalog.records[index].base}:{number}"):
            return None
        cells = (index,) * number + (None,) * (4 - number)
        return Composition("count", f"{self._words(index)} {NUMBERS[number]} times", 2, 2, cells)

    def _two(self, dice: Dice, positions: bool) -> Composition | None:
        one, other = dice.pick(self.things), dice.pick(self.things)
        bases = sorted(self.catalog.records[index].base for index in (one, other))
        if not self._fits(":".join(bases)) or not clearly_different(self.catalog, one, other):
            return None
        a, b = self._words(one), self._words(other)
        if not positions:
            return Composition("two", f"{a} and {b}", 1, 2, (one, other))
        way = dice.below(5)
        if way < 2:
            words = f"{a} to the left of {b}" if way else f"{b} to the right of {a}"
            return Composition("position", words, 1, 2, (one, other))
        if way < 4:
            words = f"{a} above {b}" if way == 2 else f"{b} below {a}"
            return Composition("position", words, 2, 1, (one, other))
        places = list(range(len(PLACES[2])))
        dice.shuffle(places)
        first, second = places[:2]
        cells = tuple(one if place == first else other if place == second else None for place in range(4))
        words = f"{a} in the {PLACES[2][first]} and {b} in the {PLACES[2][second]}"
        return Composition("position", words, 2, 2, cells)

    def asked(self, kind: str, count: int, seed: int = 0) -> list[Composition]:
        """Returns compositions to measure a model with, different ones as long as there are.

        Raises:
            TooFewError: see `compose`.
        """
        dice = Dice(seed, _EVALUATION, KINDS.index(kind))
        if kind == "single":
            order = list(self.singles)
            dice.shuffle(order)
            return [self.single(order[number % len(order)]) for number in range(count)]
        found: dict[str, Composition] = {}
        for _ in range(20 * count):
            made = self.compose(dice, kind, self.singles)
            found.setdefault(made.caption, made)
            if len(found) == count:
                break
        different = list(found.values())
        return [different[number % len(different)] for number in range(count)]


@functools.lru_cache(maxsize=8)
def compositions(config: str, split: str, data_dir: str | None = None) -> Compositions:
    """Returns the compositions of a split.

    Args:
        config: one of SUBSETS; split: one of SPLITS.

    Raises:
        ConfigError: no such config or split; TooFewError: it has too few emoji.
    """
    if config not in SUBSETS or split not in SPLITS:
        raise ConfigError(
            f"compositions of config {config!r}, split {split!r}",
            f"one of {', '.join(SUBSETS)}, and one of {', '.join(SPLITS)}",
            "correct the config",
        )
    source = "quickstart" if config == "tones" else config
    found = [(record, False) for record in catalog(source, "train", data_dir).records]
    for split_of, held in (("validation", False), ("composition", True)):
        try:
            records = catalog(source, split_of, data_dir).records
        except TooFewError:  # as without raqm
            continue
        found += [(record, held) for record in records if held or not record.gender]
    if config == "tones":
        found = [pair for pair in found if not pair[0].gender and (pair[0].skin_tone or pair[0].base in THINGS)]
    found.sort(key=lambda pair: pair[0].codepoints)
    known = Catalog([record for record, _ in found], f"openmoji/{config}")
    held_out = {index for index, (_, held) in enumerate(found) if held} | _held_tones(known)
    return Compositions(known, frozenset(held_out), split)


def _held_tones(known: Catalog) -> set[int]:
    """Returns the records of the tones that are held out: some of each base without genders, never the last three."""
    by_base: dict[str, list[int]] = defaultdict(list)
    for index in known.all:
        if known.records[index].skin_tone and not known.records[index].gender:
            by_base[known.records[index].base].append(index)
    held: set[int] = set()
    for base, members in by_base.items():
        order = sorted(members, key=lambda index: stable_hash(f"openmoji:tone:{base}:{known.records[index].skin_tone}"))
        held.update(order[: max(0, min(round(HELD_TONES * len(order)), len(order) - 3))])
    return held
