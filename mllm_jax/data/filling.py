"""The filling of one row: the subset of the remaining examples nearest to its length, within its media slots."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from operator import add, le

MAX_KINDS = 64

Kind = tuple[int, ...]  # the size of an example: tokens, then slots of each modality
Reach = dict[Kind, int]  # slots of each modality -> reachable sums of tokens, as bits


def fill_row(counts: Mapping[Kind, int], length: int, slots: Sequence[int], wanted: Sequence[float]) -> list[Kind]:
    """Chooses examples for a row: the longest one, and the best bounded subset sum of the others.

    Reachable sums are the bits of integers, one for each vector of slots, so a row costs microseconds. Of many kinds of
    examples it tries MAX_KINDS, evenly spread over the sizes.

    Args:
        counts: the number of remaining examples of each kind; at least one.
        slots: of the row, by modality.
        wanted: target number of slots of each modality for this row; each slot more or less costs as much as a
            hundredth of the row.

    Returns:
        The kinds of the chosen examples.
    """
    first = max(counts)
    others = sorted(kind for kind in counts if counts[kind] > (kind == first))
    if len(others) > MAX_KINDS:
        others = [others[i * (len(others) - 1) // (MAX_KINDS - 1)] for i in range(MAX_KINDS)]
    others.reverse()
    mask = (1 << (length + 1)) - 1
    reach = {first[1:]: 1 << first[0]}
    before = []
    for kind in others:
        before.append(reach)
        reach = _with_copies(reach, kind, counts[kind] - (kind == first), mask, slots)

    def score(used: Kind) -> float:
        missed = sum(abs(u - w) for u, w in zip(used, wanted, strict=True))
        return reach[used].bit_length() - 1 - missed * length / 100

    used = max(sorted(reach), key=score)
    total = reach[used].bit_length() - 1
    chosen = [first]
    for kind, earlier in zip(reversed(others), reversed(before), strict=True):
        while not earlier.get(used, 0) >> total & 1:
            total, used = total - kind[0], tuple(u - k for u, k in zip(used, kind[1:], strict=True))
            chosen.append(kind)
    return chosen


def _with_copies(reach: Reach, kind: Kind, copies: int, mask: int, slots: Sequence[int]) -> Reach:
    """Returns the sums that are reachable with up to `copies` more examples of a kind.

    It adds 1, 2, 4, ... examples at once, whose sums are all numbers of copies.
    """
    at_once = 1
    while copies > 0:
        number = min(at_once, copies)
        added, more = [number * k for k in kind[1:]], {}
        for used, bits in reach.items():
            after = tuple(map(add, used, added))
            if all(map(le, after, slots)) and (bits := (bits << number * kind[0]) & mask):
                more[after] = bits
        if not more:  # fewer copies are counted already
            break
        reach = dict(reach)
        for used, bits in more.items():
            reach[used] = reach.get(used, 0) | bits
        copies, at_once = copies - number, 2 * at_once
    return reach
