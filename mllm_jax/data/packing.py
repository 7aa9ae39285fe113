"""The plan of a run's data: which examples stand in which row of which step, as integers and nothing else.

The plan is a function of (seed, step). Each source is an endless stream, epoch after epoch in a new order; a block of
consecutive steps takes the piece of each stream whose running sum of tokens falls to it, found by arithmetic and one
search, so that no step needs the ones before it and every example comes once an epoch.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from mllm_jax.errors import DataError


@dataclass(frozen=True)
class Stream:
    """What the plan knows of a source: tokens and pictures of every example (0 tokens: unusable), and its weight."""

    lengths: np.ndarray
    images: np.ndarray
    weight: float


class PackingPlan:
    """Rows of packed examples for every step.

    Args:
        streams: the sources; weights are shares of examples.
        rows, length, slots: a batch's rows, a row's places and a row's media slots.
        packed: False gives each row one example.
        group: so many neighbouring examples of a source stay neighbours in an unpacked batch.
        block_steps: steps that are packed together.

    Attributes:
        fill: the share of places that a block aims at; the largest tried at which nothing is left over.
    """

    def __init__(
        self,
        streams: Sequence[Stream],
        *,
        rows: int,
        length: int,
        slots: int,
        seed: int,
        packed: bool = True,
        group: int = 1,
        block_steps: int = 16,
    ):
        self.rows, self.length, self.slots = rows, length, slots
        self.seed, self.packed, self.group, self.block_steps = seed, packed, group, block_steps
        self.usable = [np.flatnonzero(s.lengths > 0) for s in streams]
        self.streams = list(streams)
        for i, (stream, usable) in enumerate(zip(self.streams, self.usable, strict=True)):
            if stream.weight <= 0 or len(usable) == 0:
                raise DataError(
                    f"source {i}: weight {stream.weight}, {len(usable)} usable examples", "both above 0", "drop it"
                )
            widest, most = stream.lengths.max(), stream.images[usable].max()
            if widest > length or most > slots:
                raise DataError(
                    f"source {i}: an example of {widest} tokens and {most} picture(s)",
                    f"at most {length} tokens and {slots} media slots a row",
                    "raise the row's length or slots",
                )
        # Examples a block takes cost tokens when packed and one row each when not.
        self.costs = [
            s.lengths[u] if packed else np.ones(len(u), np.int64) for s, u in zip(streams, self.usable, strict=True)
        ]
        self.totals = [int(c.sum()) for c in self.costs]
        weights = np.array([s.weight for s in streams], np.float64)
        share = weights * np.array([c.mean() for c in self.costs])
        self.share = share / share.sum()
        self._permuted = lru_cache(maxsize=2 * len(streams) + 2)(self._permute)
        self._block = lru_cache(maxsize=4)(self._pack_block)
        self.fill = 1.0 if not packed else self._choose_fill()

    def _choose_fill(self) -> float:
        images = sum(
            share * s.images[u].mean() / s.lengths[u].mean()
            for share, s, u in zip(self.share, self.streams, self.usable, strict=True)
        )
        bound = min(1.0, self.slots / (self.length * images)) if images else 1.0
        for fill in np.arange(0.995, 0.60, -0.005):
            self.fill = bound * float(fill)
            if all(self._pack_block(block)[1] == 0 for block in range(3)):
                self._block.cache_clear()
                # A block may take almost one example a source more than its share; no later one shall overflow by it.
                longest = sum(int(s.lengths.max()) - 1 for s in self.streams)
                return min(self.fill, 1 - longest / (self.rows * self.length * self.block_steps))
        raise DataError(
            "examples that pack into less than 60 % of the rows", "shorter examples", "raise the row's length"
        )

    def _permute(self, source: int, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """The order of a source in an epoch, and the running sum of costs before each example."""
        rng = np.random.default_rng((self.seed, source, epoch))
        order = _permute_groups(rng, len(self.usable[source]), self.group)
        return order, np.concatenate([[0], np.cumsum(self.costs[source][order])])

    def _take(self, source: int, start: int, stop: int) -> list[int]:
        """The examples of a stream whose running cost lies in [start, stop)."""
        taken: list[np.ndarray] = []
        for epoch in range(start // self.totals[source], (stop - 1) // self.totals[source] + 1 if stop > start else 0):
            order, running = self._permuted(source, epoch)
            base = epoch * self.totals[source]
            first, last = np.searchsorted(running[:-1] + base, [start, stop])
            taken.append(self.usable[source][order[first:last]])
        return np.concatenate(taken).tolist() if taken else []

    def _bounds(self, block: int) -> list[tuple[int, int]]:
        """The piece of each stream that a block takes; unpacked, the pieces add up to its rows exactly."""
        capacity = self.rows * self.block_steps * (self.length if self.packed else 1) * self.fill

        def at(b: int) -> list[int]:
            marks = [int(b * capacity * share) for share in self.share]
            if not self.packed:
                marks[-1] = int(b * capacity) - sum(marks[:-1])
            return marks

        return list(zip(at(block), at(block + 1), strict=True))

    def _pack_block(self, block: int) -> tuple[list[list[tuple[int, int]]], int]:
        """Fills row after row; returns the rows in a shuffled order, and how many examples were left over."""
        examples = [(i, e) for i, (a, b) in enumerate(self._bounds(block)) for e in self._take(i, a, b)]
        count = self.rows * self.block_steps
        rng = np.random.default_rng((self.seed, 1 << 20, block))
        if not self.packed:
            order = _permute_groups(rng, len(examples), self.group)
            return [[examples[i]] for i in order[:count]], max(0, len(examples) - count)
        waiting: dict[tuple[int, int], list[tuple[int, int]]] = {}
        for i, e in examples:
            kind = int(self.streams[i].lengths[e]), int(self.streams[i].images[e])
            waiting.setdefault(kind, []).append((i, e))
        pictures = sum(kind[1] * len(group) for kind, group in waiting.items())
        rows: list[list[tuple[int, int]]] = []
        while waiting and len(rows) < count:
            counts = {kind: len(group) for kind, group in waiting.items()}
            kinds = fill_row(counts, self.length, self.slots, pictures / (count - len(rows)))
            rows.append([waiting[kind].pop() for kind in kinds])
            pictures -= sum(kind[1] for kind in kinds)
            waiting = {kind: group for kind, group in waiting.items() if group}
        rows += [[] for _ in range(count - len(rows))]
        return [rows[i] for i in rng.permutation(count)], sum(map(len, waiting.values()))

    def step(self, step: int) -> list[list[tuple[int, int]]]:
        """The (source, example) pairs of each row of a step."""
        rows, _ = self._block(step // self.block_steps)
        start = (step % self.block_steps) * self.rows
        return rows[start : start + self.rows]

    def statistics(self, steps: int) -> dict[str, float]:
        """Measured over the first `steps`: share of places and slots filled, examples a step, share left over."""
        blocks = [self._pack_block(b) for b in range(-(-steps // self.block_steps))]
        placed = [pair for rows, _ in blocks for row in rows for pair in row]
        tokens = sum(int(self.streams[i].lengths[e]) for i, e in placed)
        images = sum(int(self.streams[i].images[e]) for i, e in placed)
        count = len(blocks) * self.rows * self.block_steps
        left = sum(left for _, left in blocks)
        return {
            "fill": tokens / (count * self.length),
            "slot_fill": images / (count * self.slots) if self.slots else 0.0,
            "examples_per_step": len(placed) / (len(blocks) * self.block_steps),
            "left_over": left / max(1, len(placed) + left),
        }


def _permute_groups(rng: np.random.Generator, count: int, group: int) -> np.ndarray:
    """0..count-1 in a random order in which each run of `group` stays together."""
    starts = rng.permutation(-(-count // group)) * group
    order = (starts[:, None] + np.arange(group)).ravel()
    return order[order < count]


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
