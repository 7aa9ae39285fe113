"""Filling one row: the subset of what is left that comes closest to the row's length within its media slots."""

from __future__ import annotations

from collections.abc import Mapping

MAX_KINDS = 64


def fill_row(counts: Mapping[tuple[int, int], int], length: int, slots: int, wanted: float) -> list[tuple[int, int]]:
    """Chooses examples for a row: the longest one, and with it the best bounded subset sum of the others.

    Reachable sums are kept as the bits of integers, one for each number of slots, so a row costs microseconds. Where
    there are many kinds of examples, MAX_KINDS of them, evenly spread over the sizes, are tried.

    Args:
        counts: how many examples of (tokens, pictures) are left; at least one.
        wanted: pictures that this row should take so that the slots of the rows to come last; a hundredth of the row
            is given up for each picture more or less.

    Returns:
        The (tokens, pictures) of the chosen examples.
    """
    first = max(counts)
    others = sorted(kind for kind in counts if counts[kind] > (kind == first))
    if len(others) > MAX_KINDS:
        others = [others[i * (len(others) - 1) // (MAX_KINDS - 1)] for i in range(MAX_KINDS)]
    others.reverse()
    mask = (1 << (length + 1)) - 1
    reach = [0] * (slots + 1)
    reach[first[1]] = 1 << first[0]
    before = []
    for kind in others:
        before.append(reach)
        reach = _with_copies(reach, kind, counts[kind] - (kind == first), mask)

    def score(used: int) -> float:
        return reach[used].bit_length() - 1 - abs(used - wanted) * length / 100 if reach[used] else float("-inf")

    used = max(range(slots + 1), key=score)
    total = reach[used].bit_length() - 1
    chosen = [first]
    for kind, earlier in zip(reversed(others), reversed(before), strict=True):
        while not earlier[used] >> total & 1:
            total, used = total - kind[0], used - kind[1]
            chosen.append(kind)
    return chosen


def _with_copies(reach: list[int], kind: tuple[int, int], copies: int, mask: int) -> list[int]:
    """What can be reached with up to `copies` examples of a kind in addition."""
    size, pictures = kind
    total, last = list(reach), reach
    for _ in range(copies):
        last = [0] * pictures + [(bits << size) & mask for bits in last[: len(last) - pictures]]
        if not any(last):
            break
        total = [a | b for a, b in zip(total, last, strict=True)]
    return total
