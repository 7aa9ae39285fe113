"""Filling a row: the best bounded subset, against trying all of them."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from mllm_jax.data.filling import MAX_KINDS, fill_row


def figures(chosen) -> tuple[int, int]:
    """Returns (tokens, images) of the chosen examples together."""
    return sum(size for size, _ in chosen), sum(images for _, images in chosen)


def score(tokens: int, images: int, length: int, wanted: float) -> float:
    return tokens - abs(images - wanted) * length / 100


def best_of_all(counts, length, slots, wanted) -> float:
    """Returns the best value by definition: tries every number of copies of every kind, at least one of the longest."""
    kinds, first, best = list(counts), max(counts), -np.inf
    for copies in itertools.product(*(range(kind == first, counts[kind] + 1) for kind in kinds)):
        tokens = sum(n * size for n, (size, _) in zip(copies, kinds, strict=True))
        images = sum(n * count for n, (_, count) in zip(copies, kinds, strict=True))
        if tokens <= length and images <= slots:
            best = max(best, score(tokens, images, length, wanted))
    return best


def random_counts(rng, kinds: int) -> dict[tuple[int, int], int]:
    return {(int(rng.integers(2, 14)), int(rng.integers(0, 3))): int(rng.integers(1, 4)) for _ in range(kinds)}


@pytest.mark.parametrize("slots", [2, 3, 6])
def test_nothing_scores_better(slots):
    rng = np.random.default_rng(slots)
    for _ in range(60):
        counts, length, wanted = random_counts(rng, 5), int(rng.integers(14, 40)), float(rng.uniform(0, slots))
        chosen = fill_row(counts, length, [slots], [wanted])
        tokens, images = figures(chosen)
        assert chosen[0] == max(counts), "the longest is placed while there is room for it"
        assert all(chosen.count(kind) <= counts[kind] for kind in chosen), "no example is taken twice"
        assert tokens <= length and images <= slots
        found = score(tokens, images, length, wanted)
        assert found == pytest.approx(best_of_all(counts, length, slots, wanted)), (counts, length, wanted)


def test_any_number_of_copies_is_found():
    """Checks numbers that are no power of two, and more copies than the positions or the slots have room for."""
    for copies, fit in itertools.product(range(14), (5, 10)):
        counts = {(20, 0): 1} | ({(3, 1): copies} if copies else {})
        taken = min(copies, fit)
        assert figures(fill_row(counts, 50, [fit], [fit])) == (20 + 3 * taken, taken), copies


def test_what_is_wanted_decides_between_rows_of_one_length():
    counts = {(10, 0): 1, (5, 0): 2, (5, 1): 2}
    for wanted in (0, 1, 2):
        assert figures(fill_row(counts, 20, [4], [wanted])) == (20, wanted)


def test_an_image_too_many_costs_a_hundredth_of_the_row():
    """Checks 200 positions: two free ones are worth one image, so 3 more tokens outweigh it and 1 more does not."""
    for gain, images in ((3, 1), (1, 0)):
        counts = {(100, 0): 1, (90, 0): 1, (90 + gain, 1): 1}
        assert figures(fill_row(counts, 200, [4], wanted=[0])) == (190 + gain * images, images)


def test_slots_bind_where_positions_do_not():
    counts = {(8, 2): 5, (1, 0): 4}
    assert figures(fill_row(counts, 64, [5], wanted=[5])) == (20, 4)


def test_one_example_is_a_row():
    assert fill_row({(7, 1): 1}, 7, [1], [0.0]) == [(7, 1)]
    assert fill_row({(7, 1): 3}, 13, [3], [0.0]) == [(7, 1)], "a second one does not fit"
    assert fill_row({(7, 0): 3}, 64, [0], [0.0]) == [(7, 0)] * 3, "no more than there are"
    assert fill_row({(7,): 3}, 64, [], []) == [(7,)] * 3, "text takes no slots"


@pytest.mark.parametrize("seed", range(3))
def test_every_modality_has_its_own_slots(seed):
    """Compares images and frames with all subsets; neither exceeds its slots."""
    rng = np.random.default_rng(seed)
    for _ in range(40):
        kinds = [tuple(map(int, (rng.integers(2, 14), *rng.integers(0, 3, 2)))) for _ in range(4)]
        counts = {kind: int(rng.integers(1, 4)) for kind in kinds}
        length, slots = int(rng.integers(14, 40)), [3, 5]
        wanted = rng.uniform(0, slots)
        best = -np.inf
        for copies in itertools.product(*(range(kind == max(counts), counts[kind] + 1) for kind in counts)):
            tokens, *used = np.array(copies) @ np.array(list(counts))
            if tokens <= length and (np.array(used) <= slots).all():
                best = max(best, tokens - np.abs(used - wanted).sum() * length / 100)
        chosen = fill_row(counts, length, slots, wanted)
        tokens, *used = np.sum(chosen, axis=0)
        assert tokens <= length and (np.array(used) <= slots).all()
        assert tokens - np.abs(used - wanted).sum() * length / 100 == pytest.approx(best)


def test_many_kinds_still_fill_the_row():
    """Checks more kinds than are tried: the row is full to the last position, and every chosen example exists."""
    rng = np.random.default_rng(0)
    counts = {(size, int(rng.integers(0, 3))): int(rng.integers(1, 3)) for size in range(20, 20 + 3 * MAX_KINDS)}
    assert len(counts) > 2 * MAX_KINDS
    while len(counts) > MAX_KINDS:
        chosen = fill_row(counts, 512, [12], [5.0])
        assert chosen[0] == max(counts)
        tokens, images = figures(chosen)
        assert tokens == 512 and images <= 12
        for kind in chosen:
            counts[kind] -= 1
            assert counts[kind] >= 0
        counts = {kind: count for kind, count in counts.items() if count}
