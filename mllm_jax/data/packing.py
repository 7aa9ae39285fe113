"""The plan of a run's data: the examples of each row of each step, as integers.

The plan is a function of (seed, step). Each source is an endless stream with a new order each epoch. A block of
consecutive steps takes a piece of each stream by its running sum of tokens, found by arithmetic and one search. So no
step needs earlier steps, and every example occurs once per epoch.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

import numpy as np

from mllm_jax.data.filling import Kind, fill_row
from mllm_jax.data.orders import LARGE, order_of, shuffled_groups
from mllm_jax.data.units import in_words
from mllm_jax.errors import DataError


@dataclass(frozen=True)
class Stream:
    """The sizes of a source's examples, for the plan.

    Attributes:
        lengths: int[n], tokens of every example; 0: it cannot be used.
        slots: int[n] of every example, by modality; an absent modality needs none.
        weight: its share of the examples.
    """

    lengths: np.ndarray
    slots: Mapping[str, np.ndarray]
    weight: float

    def taken(self, modality: str) -> np.ndarray:
        """Returns int[n], each example's slots of a modality."""
        return self.slots.get(modality, np.zeros_like(self.lengths))


class PackingPlan:
    """Rows of packed examples for every step.

    Args:
        streams: the sources; weights are shares of examples.
        rows, length, slots: a batch's rows, a row's positions, and a row's media slots by modality.
        packed: if False, each row has one example.
        group: number of neighbouring examples of a source that stay together in an unpacked batch.
        block_steps: steps that are packed together.
        unit: the content of a slot, see `mllm_jax.data.units`.

    Attributes:
        fill: the share of positions that a block aims at: the largest tried with no example left over.
    """

    def __init__(
        self,
        streams: Sequence[Stream],
        *,
        rows: int,
        length: int,
        slots: Mapping[str, int],
        seed: int,
        packed: bool = True,
        group: int = 1,
        block_steps: int = 16,
        unit: str = "slot",
    ):
        self.rows, self.length, self.slots, self.unit = rows, length, dict(slots), unit
        self.seed, self.packed, self.group, self.block_steps = seed, packed, group, block_steps
        self.streams = [replace(s, lengths=np.asarray(s.lengths)) for s in streams]
        # For a large source no array of its size is made, see `mllm_jax.data.orders`.
        large = [len(s.lengths) > LARGE for s in streams]
        self.usable = [None if big else np.flatnonzero(s.lengths > 0) for s, big in zip(streams, large, strict=True)]
        for i, (stream, usable) in enumerate(zip(self.streams, self.usable, strict=True)):
            count = int(np.count_nonzero(stream.lengths)) if usable is None else len(usable)
            if stream.weight <= 0 or count == 0:
                raise DataError(
                    f"source {i}: weight {stream.weight}, {count} usable examples", "both above 0", "drop it"
                )
            widest = int(stream.lengths.max())
            most = {modality: int(_some(taken, usable).max()) for modality, taken in stream.slots.items()}
            if widest > length or any(count > slots.get(modality, 0) for modality, count in most.items()):
                raise DataError(
                    f"source {i}: an example of {widest:,} tokens and one of {in_words(most, unit)}",
                    f"at most {length:,} tokens and {in_words(self.slots, unit)} a row",
                    "raise the row's length or slots",
                )
        # An example costs its tokens if packed, else one row.
        self.orders = [
            order_of(s.lengths, u, (seed, i), group, packed)
            for i, (s, u) in enumerate(zip(self.streams, self.usable, strict=True))
        ]
        self.totals = [order.total for order in self.orders]
        weights = np.array([s.weight for s in streams], np.float64)
        share = weights * np.array([order.mean for order in self.orders])
        self.share = share / share.sum()
        self._block = lru_cache(maxsize=4)(self._pack_block)
        self.fill = 1.0 if not packed else self._choose_fill()

    def _choose_fill(self) -> float:
        bound = 1.0
        for modality, slots in self.slots.items():
            a_token = sum(
                share * _some(s.taken(modality), u).mean() / _some(s.lengths, u).mean()
                for share, s, u in zip(self.share, self.streams, self.usable, strict=True)
            )
            bound = min(bound, slots / (self.length * a_token)) if a_token else bound
        for fill in np.arange(0.995, 0.60, -0.005):
            self.fill = bound * float(fill)
            if all(self._pack_block(block)[1] == 0 for block in range(3)):
                self._block.cache_clear()
                # A block may take almost one example per source more than its share, and must not overflow by it.
                longest = sum(int(s.lengths.max()) - 1 for s in self.streams)
                return min(self.fill, 1 - longest / (self.rows * self.length * self.block_steps))
        room = f"{self.length:,} tokens and {in_words(self.slots, self.unit)}"
        raise DataError(
            f"examples that fill less than 60 % of rows of {room}",
            "rows that they fill better",
            "change the mixture's length and slots: `mllm data suggest CONFIG` proposes some",
        )

    def _bounds(self, block: int) -> list[tuple[int, int]]:
        """Returns the piece of each stream for a block; unpacked, the pieces add up to its rows exactly."""
        capacity = self.rows * self.block_steps * (self.length if self.packed else 1) * self.fill

        def at(b: int) -> list[int]:
            marks = [int(b * capacity * share) for share in self.share]
            if not self.packed:
                marks[-1] = int(b * capacity) - sum(marks[:-1])
            return marks

        return list(zip(at(block), at(block + 1), strict=True))

    def _pack_block(self, block: int) -> tuple[list[list[tuple[int, int]]], int]:
        """Fills one row at a time; returns the rows in a shuffled order, and the number of examples left over."""
        examples = [(i, e) for i, (a, b) in enumerate(self._bounds(block)) for e in self.orders[i].take(a, b)]
        count = self.rows * self.block_steps
        rng = np.random.default_rng((self.seed, 1 << 20, block))
        if not self.packed:
            order = shuffled_groups(rng, len(examples), self.group)
            return [[examples[i]] for i in order[:count]], max(0, len(examples) - count)
        waiting: dict[Kind, list[tuple[int, int]]] = {}
        taken = [[s.lengths, *(s.taken(modality) for modality in self.slots)] for s in self.streams]
        for i, e in examples:
            waiting.setdefault(tuple(int(resource[e]) for resource in taken[i]), []).append((i, e))
        media = np.sum([np.multiply(kind[1:], len(group)) for kind, group in waiting.items()] or 0, axis=0)
        rows: list[list[tuple[int, int]]] = []
        while waiting and len(rows) < count:
            counts = {kind: len(group) for kind, group in waiting.items()}
            kinds = fill_row(counts, self.length, list(self.slots.values()), media / (count - len(rows)))
            rows.append([waiting[kind].pop() for kind in kinds])
            media = media - np.sum([kind[1:] for kind in kinds], axis=0)
            waiting = {kind: group for kind, group in waiting.items() if group}
        rows += [[] for _ in range(count - len(rows))]
        return [rows[i] for i in rng.permutation(count)], sum(map(len, waiting.values()))

    def step(self, step: int) -> list[list[tuple[int, int]]]:
        """Returns the (source, example) pairs of each row of a step."""
        rows, _ = self._block(step // self.block_steps)
        start = (step % self.block_steps) * self.rows
        return rows[start : start + self.rows]

    def statistics(self, steps: int) -> dict[str, float]:
        """Measures the first `steps`: share of positions and slots filled, examples per step, share left over."""
        blocks = [self._pack_block(b) for b in range(-(-steps // self.block_steps))]
        placed = [pair for rows, _ in blocks for row in rows for pair in row]
        tokens = sum(int(self.streams[i].lengths[e]) for i, e in placed)
        media = sum(int(self.streams[i].taken(modality)[e]) for i, e in placed for modality in self.slots)
        slots = sum(self.slots.values())
        count = len(blocks) * self.rows * self.block_steps
        left = sum(left for _, left in blocks)
        return {
            "fill": tokens / (count * self.length),
            "slot_fill": media / (count * slots) if slots else 0.0,
            "examples_per_step": len(placed) / (len(blocks) * self.block_steps),
            "left_over": left / max(1, len(placed) + left),
        }


def _some(values: np.ndarray, usable: np.ndarray | None) -> np.ndarray:
    """Returns the values of usable examples; for a large source all values, with 0 for the others."""
    return values if usable is None else values[usable]
