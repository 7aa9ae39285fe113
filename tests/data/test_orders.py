"""Orders of sources: a computed one is a permutation, looks like a shuffle, and is computed piece by piece."""

from __future__ import annotations

import tracemalloc
from collections import Counter

import numpy as np
import pytest

from mllm_jax.data import orders, packing
from mllm_jax.data.orders import ComputedOrder, ShuffledOrder, permuted_numbers
from mllm_jax.data.packing import PackingPlan, Stream


def stream(count=150, weight=1.0, seed=0, low=5, high=30, images=2) -> Stream:
    rng = np.random.default_rng(seed)
    return Stream(rng.integers(low, high, count), {"image": rng.integers(0, images + 1, count)}, weight)


def plan(*streams, **change) -> PackingPlan:
    return PackingPlan(streams, **dict(rows=4, length=64, slots={"image": 6}, seed=3, block_steps=8) | change)


@pytest.mark.parametrize("count", [1, 2, 3, 5, 16, 17, 255, 256, 257, 1000, 4097, 65_537, 300_000])
def test_it_permutes_the_numbers_below_any_count(count):
    found = permuted_numbers(np.arange(count, dtype=np.uint64), count, (0, 1, 2))
    assert np.bincount(found.astype(np.int64), minlength=count).tolist() == [1] * count


def test_pieces_of_a_huge_permutation_agree_with_one_another():
    """Checks numbers above 2^32: each alone or with others, without those before it; no two are equal."""
    count, key = 10**12 + 39, (7, 0, 3)
    numbers = np.random.default_rng(0).integers(0, count, 5000).astype(np.uint64)
    together = permuted_numbers(numbers, count, key)
    assert (together < count).all() and len(set(together.tolist())) == len(set(numbers.tolist()))
    for place in (0, 17, 4999):
        assert permuted_numbers(numbers[place : place + 1], count, key)[0] == together[place]


def test_the_key_decides():
    numbers = np.arange(1000, dtype=np.uint64)
    base = permuted_numbers(numbers, 1000, (3, 0, 0))
    for key in ((4, 0, 0), (3, 1, 0), (3, 0, 1)):
        assert (permuted_numbers(numbers, 1000, key) == base).mean() < 0.02


def test_no_order_is_visible():
    """Compares with a shuffle: fixed points, neighbours that stay neighbours, correlation, and positions of a piece.

    The bounds are five standard deviations.
    """
    count = 100_003
    for epoch in range(3):
        found = permuted_numbers(np.arange(count, dtype=np.uint64), count, (11, 0, epoch)).astype(np.int64)
        assert (found == np.arange(count)).sum() <= 7
        steps = np.diff(found)
        assert (np.abs(steps) == 1).sum() <= 14
        assert abs(np.corrcoef(found[:-1], found[1:])[0, 1]) < 5 / np.sqrt(count)
        assert abs(np.corrcoef(np.arange(count), found)[0, 1]) < 5 / np.sqrt(count)
        # The first tenth falls into 20 bins equally: chi-squared with 19 degrees of freedom.
        bins = np.bincount(found[: count // 10] * 20 // count, minlength=20)
        assert ((bins - bins.mean()) ** 2 / bins.mean()).sum() < 19 + 5 * np.sqrt(38)
        # Steps between neighbours are triangular: no step is preferred.
        assert Counter(steps.tolist()).most_common(1)[0][1] <= 12


def lengths_of(count: int, unusable: float = 0.1) -> np.ndarray:
    rng = np.random.default_rng(5)
    return np.where(rng.random(count) < unusable, 0, rng.integers(5, 30, count)).astype(np.int32)


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("group", [1, 4])
def test_a_computed_order_is_an_endless_stream_in_pieces(monkeypatch, packed, group):
    """Checks that any pieces of the stream give the same examples, each usable one once an epoch, others never."""
    monkeypatch.setattr(orders, "CHUNK", 64)
    lengths = lengths_of(1003)
    order = ComputedOrder(lengths, (2, 0), group, packed)
    usable = np.flatnonzero(lengths).tolist()
    assert order.total == (lengths.sum() if packed else len(usable))
    assert order.mean == pytest.approx(lengths[usable].mean() if packed else 1)
    whole = order.take(0, 2 * order.total)
    assert sorted(whole[: len(usable)]) == sorted(whole[len(usable) :]) == usable
    assert whole[: len(usable)] != whole[len(usable) :] and whole[: len(usable)] != usable
    rng = np.random.default_rng(0)
    cuts = [0, *np.sort(rng.choice(np.arange(1, 2 * order.total), 40, replace=False)).tolist(), 2 * order.total]
    fresh = ComputedOrder(lengths, (2, 0), group, packed)
    pieces = {i: fresh.take(cuts[i], cuts[i + 1]) for i in rng.permutation(41).tolist()}
    assert [e for i in range(41) for e in pieces[i]] == whole
    costs = lengths if packed else (lengths > 0)
    here = np.cumsum([0, *(int(costs[e]) for e in whole[:-1])])
    assert pieces[7] == [e for e, at in zip(whole, here, strict=True) if cuts[7] <= at < cuts[8]]
    if group > 1:
        runs = [[e for e in whole[: len(usable)] if e // group == run] for run in range(-(-1003 // group))]
        at = {e: place for place, e in enumerate(whole[: len(usable)])}
        assert all([at[e] for e in run] == list(range(at[run[0]], at[run[0]] + len(run))) for run in runs if run)


@pytest.mark.parametrize("packed", [True, False])
def test_a_plan_of_a_large_source_needs_no_history(monkeypatch, packed):
    """Checks as for other sources: each example once an epoch, the same rows in any order of calls, no row too full."""
    monkeypatch.setattr(packing, "LARGE", 100)
    monkeypatch.setattr(orders, "CHUNK", 64)
    large, small = stream(300), stream(40, weight=0.5, seed=1)
    large.lengths[::7] = 0
    large.slots["image"][::7] = 0
    p = plan(large, small, packed=packed)
    assert isinstance(p.orders[0], ComputedOrder) and isinstance(p.orders[1], ShuffledOrder)
    walked = [p.step(step) for step in range(160)]
    jumping = plan(large, small, packed=packed)
    for step in (159, 3, 77, 0):
        assert jumping.step(step) == walked[step]
    counts = Counter(e for rows in walked for row in rows for i, e in row if i == 0)
    assert set(counts) == set(np.flatnonzero(large.lengths).tolist())
    assert max(counts.values()) - min(counts.values()) <= 1 and min(counts.values()) >= 1
    assert max(sum(int(p.streams[i].lengths[e]) for i, e in row) for rows in walked for row in rows) <= 64


def test_up_to_16_million_the_order_stays_as_it_was():
    """Compares with stored steps of the code before computed orders, on which runs were trained."""
    assert orders.LARGE == packing.LARGE == 2**24
    assert plan(stream(), stream(40, weight=0.5, seed=1)).step(77)[0] == GOLDEN_PACKED
    assert [row[0] for row in plan(stream(152), rows=8, packed=False, group=4).step(21)] == GOLDEN_GROUPED


@pytest.mark.parametrize("packed", [True, False])
def test_a_large_source_takes_little_memory(monkeypatch, packed):
    """Checks that no array of the source's size is made: a shuffled order takes at least 20 bytes an example."""
    monkeypatch.setattr(packing, "LARGE", 1 << 20)
    count = 2_000_000
    lengths = np.full(count, 100, np.uint16)
    tracemalloc.start()
    p = PackingPlan([Stream(lengths, {}, 1.0)], rows=8, length=1000, slots={}, seed=0, packed=packed, block_steps=1)
    rows = p.step(3)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert len({e for row in rows for _, e in row}) >= 8 and peak < 6 * count, peak


GOLDEN_PACKED = [(1, 6), (0, 133), (1, 37), (0, 138)]
GOLDEN_GROUPED = [(0, 88), (0, 89), (0, 90), (0, 91), (0, 48), (0, 49), (0, 50), (0, 51)]
