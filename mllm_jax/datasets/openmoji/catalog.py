"""The records of a split by base and group, and the claims that are true or false of an image."""

from __future__ import annotations

import functools
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from mllm_jax.datasets.openmoji.drawing import INSTALL_PILLOW
from mllm_jax.datasets.openmoji.records import Record, digest, load
from mllm_jax.errors import DataError, TooFewError

# Bases that are also true of other images: of a whole subcategory ("person" is true of every record of persons), or of
# single other bases.
_TRUE_OF_GROUP = {"bird": "bird", "bug": "bug", "fish": "sea animal"}
_PERSONS = ("person", "family")
_TRUE_OF_BASE = {
    "automobile": {"taxi", "police car", "racing car", "sport utility vehicle"},
    "bear": {"panda", "koala"},
    "bus": {"trolleybus", "minibus"},
    "chicken": {"rooster"},
    "cow": {"ox"},
    "deer": {"moose"},
    "dog": {"poodle"},
    "house": {"hut"},
    "monkey": {"gorilla", "orangutan"},
    "older person": {"person with white hair"},
    "ship": {"ferry", "sailboat"},
    "train": {"locomotive"},
}


class Dice:
    """Random numbers for one example, drawn in one call: each call of a NumPy generator costs microseconds."""

    def __init__(self, *seed: int):
        self._rng = np.random.default_rng(seed)
        self._numbers: list[float] = []

    def chance(self, probability: float) -> bool:
        return self._next() < probability

    def below(self, count: int) -> int:
        """Returns an integer in [0, count)."""
        return int(self._next() * count)

    def pick(self, items: Sequence):
        return items[int(self._next() * len(items))]

    def shuffle(self, items: list) -> None:
        for last in range(len(items) - 1, 0, -1):
            other = self.below(last + 1)
            items[last], items[other] = items[other], items[last]

    def _next(self) -> float:
        if not self._numbers:
            self._numbers = self._rng.random(48).tolist()
        return self._numbers.pop()


@dataclass(frozen=True)
class Claim:
    """Words that are true or false of an image; an empty gender or tone is left open."""

    text: str
    base: str
    gender: str
    tone: str

    def holds(self, record: Record) -> bool:
        return self.base == record.base and self.gender in ("", record.gender) and self.tone in ("", record.skin_tone)


FULL, PLAIN, BASE = 0, 1, 2


def claims_of(record: Record) -> tuple[Claim, Claim, Claim]:
    """Returns the true claims of a record: with tone and gender (FULL), without tone (PLAIN), the base alone (BASE).

    Names do not mention the neutral gender and the default tone, so such a claim leaves them open.
    """
    tone = "" if record.skin_tone in ("", "default") else record.skin_tone
    gender = "" if record.gender == "person" else record.gender
    plain = record.name.removesuffix(f" with {tone} skin tone") if tone else record.name
    return (
        Claim(record.name, record.base, gender, tone),
        Claim(plain, record.base, gender, ""),
        Claim(record.base, record.base, "", ""),
    )


class Catalog:
    """The records of one split with the look-ups that questions need; `catalog()` builds it."""

    def __init__(self, records: Sequence[Record], where: str):
        if not records:
            raise TooFewError(
                f"{where} has no images",
                "at least one",
                f"choose another split, or if Pillow has no raqm, {INSTALL_PILLOW}",
            )
        self.records = tuple(records)
        self.where = where
        self.digest = digest(records)
        self.claims = [claims_of(record) for record in self.records]
        self.by_base: dict[str, list[int]] = defaultdict(list)
        self.by_subcategory: dict[str, list[int]] = defaultdict(list)
        self.by_category: dict[str, list[int]] = defaultdict(list)
        for index, record in enumerate(self.records):
            self.by_base[record.base].append(index)
            self.by_subcategory[record.subcategory].append(index)
            self.by_category[record.category].append(index)
        self.all = list(range(len(self.records)))
        self.group_of = {record.base: record.subcategory for record in self.records}

    def schedule(self, per_base: int) -> list[int]:
        """Returns record indices with each base at least `per_base` times; forms of small bases are repeated."""
        repeats = [-(-per_base // len(self.by_base[record.base])) for record in self.records]
        return [index for index, count in enumerate(repeats) for _ in range(max(1, count))]

    def refutes(self, claim: Claim, index: int) -> bool:
        """Returns whether the claim is certainly false of a record: neither true nor true in a wider sense."""
        record = self.records[index]
        if claim.base == record.base:
            return not claim.holds(record)
        return not _related(claim.base, self.group_of[claim.base], record.base, record.subcategory)

    def wrong_claim(self, dice: Dice, near: int, shown: Sequence[int], level: int) -> Claim | None:
        """Returns a plausible claim that is false of every record in `shown`.

        Args:
            near: the record to stay close to: same base in another tone or gender (2 in 10), same subcategory (2), same
                category (3), anything else (3).
            shown: indices of all records in the image.
            level: FULL, PLAIN or BASE, as in `claims_of`.

        Returns:
            None if no record of the split gives a false claim.
        """
        record = self.records[near]
        for attempt in range(12):
            chance = dice.below(10)
            if chance < 2 and attempt < 4 and level != BASE and len(self.by_base[record.base]) > 1:
                pool = self.by_base[record.base]
            elif chance < 4:
                pool = self.by_subcategory[record.subcategory]
            elif chance < 7:
                pool = self.by_category[record.category]
            else:
                pool = self.all
            claim = self.claims[dice.pick(pool)][level]
            if all(self.refutes(claim, index) for index in shown):
                return claim
        start = dice.below(len(self.all))
        for index in self.all[start:] + self.all[:start]:
            claim = self.claims[index][level]
            if all(self.refutes(claim, other) for other in shown):
                return claim
        return None

    def level(self, dice: Dice, base_share: float = 0.6) -> int:
        """Draws a level: BASE with probability `base_share`, PLAIN with 0.2, else FULL."""
        number = dice.below(100) / 100
        return BASE if number < base_share else PLAIN if number < base_share + 0.2 else FULL


@functools.lru_cache(maxsize=16)
def catalog(config: str, split: str, data_dir: str | None = None) -> Catalog:
    """Returns the catalog of a split, which each process reads once.

    Raises:
        DataError: no such config or split, or the data cannot be prepared.
        TooFewError: the split has no images.
    """
    splits = load(config, data_dir)
    if split not in splits:
        raise DataError(f"openmoji split {split!r}", f"one of {', '.join(splits)}", "correct the name")
    return Catalog(splits[split], f"openmoji/{config}/{split}")


@functools.lru_cache(maxsize=1 << 18)
def _related(one: str, one_group: str, other: str, other_group: str) -> bool:
    """Returns whether one base could go by the other's name: "cat" and "cat face", "dog" and "poodle".

    `one_group` and `other_group` are their subcategories.
    """
    first, second = set(one.split()), set(other.split())
    return first <= second or second <= first or _covers(one, other, other_group) or _covers(other, one, one_group)


def _covers(wide: str, base: str, group: str) -> bool:
    persons = wide == "person" and any(word in _PERSONS for word in group.split())
    return persons or _TRUE_OF_GROUP.get(wide) == group or base in _TRUE_OF_BASE.get(wide, ())
