"""The order of a source's examples: an endless stream with a new order each epoch, of which any piece can be computed.

A stream is a function of (seed, source, epoch). For up to LARGE examples an epoch's order is a shuffled array. For more
it is a keyed permutation of the numbers below n, of which each piece is computed without the others; in memory is only
one sum of costs for each CHUNK of the order.
"""

from __future__ import annotations

import hashlib
import math
from functools import lru_cache
from typing import Protocol

import numpy as np

LARGE = 1 << 24
CHUNK = 1 << 16
ROUNDS = 8


class Order(Protocol):
    """An endless stream of a source's examples, each with a cost.

    Attributes:
        total: the cost of an epoch.
        mean: the average cost of a usable example.
    """

    total: int
    mean: float

    def take(self, start: int, stop: int) -> list[int]:
        """Returns the examples whose running cost over all epochs is in [start, stop)."""
        ...


def order_of(lengths: np.ndarray, usable: np.ndarray | None, key: tuple[int, int], group: int, packed: bool) -> Order:
    """Returns the order of a source.

    Args:
        lengths: int[n] of its examples; an example of length 0 is left out.
        usable: int[m], the examples that are not left out; None for a large source.
        key: seed and source.
        group: number of neighbouring examples that stay together.
        packed: an example costs its tokens; if False, 1.
    """
    if usable is None:
        return ComputedOrder(lengths, key, group, packed)
    return ShuffledOrder(lengths[usable] if packed else np.ones(len(usable), np.int64), usable, key, group)


class ShuffledOrder:
    """An order that is an array in memory."""

    def __init__(self, costs: np.ndarray, usable: np.ndarray, key: tuple[int, int], group: int):
        self.costs, self.usable, self.key, self.group = costs, usable, key, group
        self.total, self.mean = int(costs.sum()), costs.mean()
        self._epoch = lru_cache(maxsize=4)(self._shuffle)

    def take(self, start: int, stop: int) -> list[int]:
        taken: list[np.ndarray] = []
        for epoch in range(start // self.total, (stop - 1) // self.total + 1 if stop > start else 0):
            order, running = self._epoch(epoch)
            first, last = np.searchsorted(running[:-1], [start - epoch * self.total, stop - epoch * self.total])
            taken.append(self.usable[order[first:last]])
        return np.concatenate(taken).tolist() if taken else []

    def _shuffle(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """Returns an epoch's order, and the running sum of costs before each example."""
        rng = np.random.default_rng((*self.key, epoch))
        order = shuffled_groups(rng, len(self.usable), self.group).astype(np.int32)
        return order, np.concatenate([[0], np.cumsum(self.costs[order], dtype=np.int64)])


class ComputedOrder:
    """An order that is computed piece by piece; examples that are left out cost nothing."""

    def __init__(self, lengths: np.ndarray, key: tuple[int, int], group: int, packed: bool):
        self.lengths, self.key, self.group, self.packed = lengths, key, group, packed
        self.groups = -(-len(lengths) // group)
        self.chunks = -(-self.groups * group // CHUNK)
        usable = int(np.count_nonzero(lengths))
        self.total = int(lengths.sum(dtype=np.int64)) if packed else usable
        self.mean = self.total / max(usable, 1)
        self._sums = lru_cache(maxsize=2)(self._sum_chunks)
        self._piece = lru_cache(maxsize=4)(self._chunk)

    def take(self, start: int, stop: int) -> list[int]:
        taken: list[np.ndarray] = []
        for epoch in range(start // self.total, (stop - 1) // self.total + 1 if stop > start else 0):
            sums, base = self._sums(epoch), epoch * self.total
            # The chunks in which an example may begin in [start, stop), from the chunk that holds `start`.
            first, last = np.searchsorted(sums, [start - base, stop - base], side="left")
            for chunk in range(max(first - 1, 0), min(last, self.chunks)):
                indices, running = self._piece(epoch, chunk)
                here = running + sums[chunk] + base
                taken.append(indices[(here >= start) & (here < stop)])
        return np.concatenate(taken).tolist() if taken else []

    def _costs(self, indices: np.ndarray) -> np.ndarray:
        lengths = self.lengths[indices]
        return lengths.astype(np.int64) if self.packed else (lengths > 0).astype(np.int64)

    def _chunk(self, epoch: int, chunk: int) -> tuple[np.ndarray, np.ndarray]:
        """Returns a piece of an epoch's order, and the running sum of costs in it before each example."""
        places = np.arange(chunk * CHUNK, min((chunk + 1) * CHUNK, self.groups * self.group), dtype=np.uint64)
        permuted = permuted_numbers(places // np.uint64(self.group), self.groups, (*self.key, epoch))
        indices = permuted.astype(np.int64) * self.group + (places % np.uint64(self.group)).astype(np.int64)
        indices = indices[indices < len(self.lengths)]
        indices = indices[self.lengths[indices] > 0]
        costs = self._costs(indices)
        return indices, np.cumsum(costs) - costs

    def _sum_chunks(self, epoch: int) -> np.ndarray:
        """Returns int64[chunks + 1]: the running sum of costs before each chunk of an epoch."""
        if self.total == len(self.lengths) == self.groups * self.group and not self.packed:  # each costs 1
            return np.minimum(np.arange(self.chunks + 1) * CHUNK, self.total)
        sums = [int(self._costs(self._chunk(epoch, chunk)[0]).sum()) for chunk in range(self.chunks)]
        return np.concatenate([[0], np.cumsum(sums, dtype=np.int64)])


def permuted_numbers(numbers: np.ndarray, count: int, key: tuple[int, ...]) -> np.ndarray:
    """Applies the key's permutation of 0..count-1 to some numbers: uint64[k] -> uint64[k]; count is below 2^62.

    A Feistel network on two digits to the base ceil(sqrt(count)) adds to each digit in turn a keyed function of the
    other. A result of count or more goes through it again until it is smaller ("Ciphers with arbitrary finite domains",
    Black and Rogaway 2002); of count numbers about 2 sqrt(count) do.
    """
    base = np.uint64(math.isqrt(count - 1) + 1)
    keys = np.frombuffer(hashlib.blake2b(repr(key).encode(), digest_size=8 * ROUNDS).digest(), np.uint64)
    found = np.array(numbers, np.uint64)
    outside = slice(None)
    while True:
        high, low = np.divmod(found[outside], base)
        for each in keys:
            high, low = low, _added(high, _mixed(low + each), base)
        found[outside] = high * base + low
        (outside,) = np.nonzero(found >= count)
        if not len(outside):
            return found


def _added(digit: np.ndarray, bits: np.ndarray, base: np.uint64) -> np.ndarray:
    """Adds to the digit a number that 32 bits determine, modulo the base."""
    total = digit + (((bits >> np.uint64(32)) * base) >> np.uint64(32))
    return np.where(total >= base, total - base, total)


def shuffled_groups(rng: np.random.Generator, count: int, group: int) -> np.ndarray:
    """Returns 0..count-1 in a random order in which each run of `group` stays together."""
    starts = rng.permutation(-(-count // group)) * group
    order = (starts[:, None] + np.arange(group)).ravel()
    return order[order < count]


def _mixed(x: np.ndarray) -> np.ndarray:
    """Applies the last step of splitmix64: every input bit changes half of the output bits."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))
