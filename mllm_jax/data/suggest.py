"""Proposes rows for data from the measured sizes of a sample: their fill, and the examples they shorten or refuse."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from mllm_jax.errors import DataError

_ENOUGH = 0.99  # of the fill without a bound on slots; more slots would be mostly padding
_MOST_SHORTENED = 0.01  # of the examples, in the proposed rows


@dataclass(frozen=True)
class Sizes:
    """The positions and slots of examples in a sample of a stage's data.

    Attributes:
        lengths: int[n], positions of each example with all its turns.
        least: int[n], positions with its first turn alone, its shortest form.
        slots: int[n] by modality.
    """

    lengths: np.ndarray
    least: np.ndarray
    slots: Mapping[str, np.ndarray]

    def __post_init__(self):
        if not len(self.lengths):
            raise DataError("a sample without an example that can be used", "at least one", "correct the records")


@dataclass(frozen=True)
class Candidate:
    """Rows of one length, and the sample's result in them.

    Attributes:
        slots: of a row, by modality.
        fill: share of the positions that are not padding.
        shortened, refused: shares of the examples that lose turns, or cannot be used.
    """

    length: int
    slots: Mapping[str, int]
    fill: float
    shortened: float
    refused: float


def judge(sizes: Sizes, length: int, slots: Mapping[str, int] | None = None, *, packed: bool = True) -> Candidate:
    """Computes the sample's result in rows of one length.

    Args:
        slots: of a row; None: the fewest that fill the rows about as well as any number.
        packed: if False, each row has one example.
    """
    shortened = (sizes.lengths > length) & (sizes.least <= length)
    refused = sizes.least > length
    if slots is not None:
        refused = refused | np.any([taken > slots.get(m, 0) for m, taken in sizes.slots.items()] or [refused], axis=0)
    usable = ~refused
    shares = float((shortened & usable).mean()), float(refused.mean())
    if not usable.any():
        return Candidate(length, slots or {}, 0.0, *shares)
    kept = np.where(shortened, sizes.least, sizes.lengths)[usable]
    taken = {modality: column[usable] for modality, column in sizes.slots.items()}
    if slots is None:
        slots = _fewest(kept, taken, length, packed)
    return Candidate(length, slots, _packed(kept, taken, length, slots, packed)[0], *shares)


def candidates(sizes: Sizes, *, packed: bool = True, unit: int = 1) -> list[Candidate]:
    """Returns rows of some lengths from that of a usual example to that of the longest, the shortest first.

    Args:
        unit: the length is a multiple of it.
    """
    low, high = np.quantile(sizes.lengths, 0.5), sizes.lengths.max()
    longest = int(4 * high if packed else high)  # longer rows lose less at their ends
    step = int(np.lcm(32, unit))
    lengths = {-(-int(high) // step) * step}
    lengths |= {-(-n // step) * step for power in range(5, 18) for n in (2**power, 3 * 2 ** (power - 1))}
    return [judge(sizes, n, packed=packed) for n in sorted(lengths) if low <= n <= max(longest, min(lengths))]


def best(found: Sequence[Candidate]) -> Candidate:
    """Returns the proposed candidate: of those that refuse fewest examples and shorten almost none, one of the fullest.

    Prefers shorter rows, in which attention costs less, to one per cent of fill.
    """
    fewest = min(each.refused for each in found)
    kept = [each for each in found if each.refused == fewest]
    least = min(each.shortened for each in kept)
    kept = [each for each in kept if each.shortened <= max(least, _MOST_SHORTENED)]
    fullest = max(each.fill for each in kept)
    return min((each for each in kept if each.fill >= fullest - 0.01), key=lambda each: each.length)


def rows_for(candidate: Candidate, rows: int, length: int, unit: int = 1) -> int:
    """Returns the number of rows with about as many tokens as `rows` of `length`.

    Args:
        unit: the number of rows is a multiple of it.
    """
    return max(unit, round(rows * length / candidate.length / unit) * unit)


# ---- inside


def _fewest(lengths: np.ndarray, taken: Mapping[str, np.ndarray], length: int, packed: bool) -> dict[str, int]:
    """Returns the fewest slots with which rows fill about as well as with any number."""
    slots = {modality: int(column.max()) for modality, column in taken.items() if column.any()}
    if not slots or not packed:
        return slots
    a_token = {modality: taken[modality].sum() / lengths.sum() for modality in slots}
    slots = {modality: max(count, int(np.ceil(a_token[modality] * length))) for modality, count in slots.items()}
    unbounded = {modality: int(column.sum()) for modality, column in taken.items() if modality in slots}
    wanted = _ENOUGH * _packed(lengths, taken, length, unbounded, packed)[0]
    while (found := _packed(lengths, taken, length, slots, packed))[0] < wanted:
        slots = {m: min(count + max(1, count // 8), unbounded[m]) for m, count in slots.items()}
    return found[1]


def _packed(
    lengths: np.ndarray, taken: Mapping[str, np.ndarray], length: int, slots: Mapping[str, int], packed: bool
) -> tuple[float, dict[str, int]]:
    """Packs each example once; returns the share of positions that are filled, and the most slots of a row.

    The longest comes first, each in the row that it fits best. A run's plan chooses among many more examples and fills
    rows a little better.
    """
    if not packed:
        return float(lengths.mean() / length), dict(slots)
    needed = np.stack([lengths, *(taken[name] for name in slots)], axis=1)
    free = np.tile([length, *slots.values()], (len(lengths), 1))  # at most one row per example
    used = 0
    for example in needed[np.argsort(-lengths, kind="stable")]:
        fitting = np.flatnonzero((free[: used + 1] >= example).all(axis=1))
        row = fitting[np.argmin(free[fitting, 0])]
        free[row] -= example
        used = max(used, row + 1)
    most = np.array(list(slots.values()), np.int64) - free[:used, 1:].min(axis=0)
    return float(lengths.sum() / (used * length)), dict(zip(slots, most.tolist(), strict=True))
