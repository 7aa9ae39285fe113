"""Filling one row: the subset of what is left that comes closest to the row's length within its media slots."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

MAX_KINDS = 64

Kind = tuple[int, ...]  # what an example takes of a row: tokens, then slots of each modality
Reach = dict[Kind, int]  # slots of each modality -> the sums of tokens that can be reached with them, as bits


def fill_row(counts: Mapping[Kind, int], length: int, slots: Sequence[int], wanted: Sequence[float]) -> list[Kind]:
    """Chooses examples for a row: the longest one, and with it the best bounded subset sum of the others.

    Reachable sums are kept as the bits of integers, one for each vector of slots, so a row costs microseconds. Where
    there are many kinds of examples, MAX_KINDS of them, evenly spread over the sizes, are tried.

    Args:
        counts: how many examples of each kind are left; at least one.
        slots: of the row, by modality.
        wanted: slots of each modality that this row should take so that the slots of the rows to come last; a hundredth
            of the row is given up for each slot more or less.

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
    """What can be reached with up to `copies` examples of a kind in addition."""
    total, last = dict(reach), reach
    for _ in range(copies):
        more = {}
        for used, bits in last.items():
            after = tuple(u + k for u, k in zip(used, kind[1:], strict=True))
            if all(a <= s for a, s in zip(after, slots, strict=True)) and (bits := (bits << kind[0]) & mask):
                more[after] = bits
        if not more:
            break
        for used, bits in more.items():
            total[used] = total.get(used, 0) | bits
        last = more
    return total
