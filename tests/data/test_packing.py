"""The packing plan: every example once an epoch, a function of (seed, step), within slots, by weights."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest

from mllm_jax.data.packing import PackingPlan, Stream
from mllm_jax.errors import DataError


def stream(count=150, weight=1.0, seed=0, low=5, high=30, images=2) -> Stream:
    rng = np.random.default_rng(seed)
    return Stream(rng.integers(low, high, count), {"image": rng.integers(0, images + 1, count)}, weight)


def plan(*streams, **change) -> PackingPlan:
    settings = dict(rows=4, length=64, slots={"image": 6}, seed=3, block_steps=8) | change
    return PackingPlan(streams or (stream(),), **settings)


def placed(p: PackingPlan, steps) -> list[tuple[int, int]]:
    return [pair for step in steps for row in p.step(step) for pair in row]


def epochs(p: PackingPlan, source: int) -> int:
    """Returns the steps, in whole blocks, that hold at least three epochs of a source."""
    tokens_a_step = p.rows * (p.length if p.packed else 1) * p.fill * p.share[source]
    blocks = int(3 * p.totals[source] / (tokens_a_step * p.block_steps)) + 2
    return blocks * p.block_steps


@pytest.mark.parametrize("packed", [True, False])
def test_every_example_comes_once_an_epoch(packed):
    first, second = stream(), stream(40, weight=0.5, seed=1)
    p = plan(first, second, packed=packed)
    for source, s in enumerate((first, second)):
        steps = epochs(p, source)
        assert p.statistics(steps)["left_over"] == 0
        counts = Counter(e for i, e in placed(p, range(steps)) if i == source)
        assert set(counts) == set(range(len(s.lengths)))
        # An unfinished epoch may have used some examples and not others: the counts differ by at most one.
        assert min(counts.values()) >= 3 and max(counts.values()) - min(counts.values()) <= 1


def test_blocks_take_disjoint_pieces():
    """Checks that within an epoch no two blocks share an example, and all together make the epoch."""
    p = plan()
    blocks = [placed(p, range(b * 8, b * 8 + 8)) for b in range(20)]
    taken, whole = [], 0
    for block in blocks:
        if whole + sum(int(p.streams[0].lengths[e]) for _, e in block) > p.totals[0]:
            break
        taken += block
        whole += sum(int(p.streams[0].lengths[e]) for _, e in block)
    assert len(taken) > 50 and len(taken) == len(set(taken))


def test_epochs_come_in_different_orders():
    p = plan(packed=False, rows=1, block_steps=1)
    count = len(p.streams[0].lengths)
    first, second = ([e for _, e in placed(p, range(k * count, (k + 1) * count))] for k in (0, 1))
    assert sorted(first) == sorted(second) == list(range(count))
    assert first != second and first != sorted(first)


@pytest.mark.parametrize("packed", [True, False])
def test_any_step_without_history_and_in_any_order(packed):
    streams = (stream(), stream(40, seed=1))
    forwards = plan(*streams, packed=packed)
    walked = [forwards.step(step) for step in range(100)]
    jumping = plan(*streams, packed=packed)
    for step in np.random.default_rng(0).permutation(100):
        assert jumping.step(int(step)) == walked[step]
    assert plan(*streams, packed=packed).step(77) == walked[77]
    assert plan(*streams, packed=packed).step(1_000_003) == forwards.step(1_000_003)


def test_the_seed_decides():
    assert plan(seed=3).step(0) == plan(seed=3).step(0)
    assert plan(seed=3).step(0) != plan(seed=4).step(0)


def test_rows_hold_no_more_than_their_positions_and_slots():
    """Checks many images, so that the slots fill before the positions."""
    s = stream(images=4)
    p = plan(s, slots={"image": 5})
    tightest = 0
    for step in range(64):
        rows = p.step(step)
        assert len(rows) == 4
        for row in rows:
            assert sum(s.lengths[e] for _, e in row) <= 64
            images = sum(s.slots["image"][e] for _, e in row)
            assert images <= 5
            tightest = max(tightest, images)
    assert tightest == 5


def test_rows_are_well_filled_on_short_examples():
    p = plan(stream(4000), rows=16, length=256, slots={"image": 40}, block_steps=16)
    found = p.statistics(64)
    assert found["fill"] >= 0.97
    assert found["left_over"] == 0


def test_unpacked_rows_hold_exactly_one_example_each():
    p = plan(stream(), stream(7, weight=0.3, seed=1), stream(30, weight=0.21, seed=2), packed=False)
    for step in range(80):
        rows = p.step(step)
        assert len(rows) == 4 and all(len(row) == 1 for row in rows)


def grouped(count: int, **change) -> PackingPlan:
    return plan(stream(count), **dict(rows=8, packed=False, group=4) | change)


def test_neighbours_stay_together_in_every_step():
    """Checks that each run of four is whole, in four successive rows, across epochs and blocks."""
    p = grouped(152, block_steps=19)  # a block is an epoch: 38 runs
    orders = []
    for step in range(57):
        found = [row[0][1] for row in p.step(step)]
        for start in range(0, 8, 4):
            assert found[start] % 4 == 0 and found[start : start + 4] == list(range(found[start], found[start] + 4))
        orders += found[::4]
    assert len(set(orders[:38])) == 38 and orders[:38] != sorted(orders[:38]), "the runs come in random order"
    assert orders[:38] != orders[38:76], "and in another one in the next epoch"


def test_without_groups_neighbours_part():
    p = grouped(152, group=1)
    runs = [{row[0][1] // 4 for row in p.step(step)} for step in range(40)]
    assert sum(map(len, runs)) > 6 * len(runs)


@pytest.mark.parametrize("count", [152, 150, 3])
def test_groups_leave_every_example_once_an_epoch(count):
    """Checks also an epoch whose last run is short."""
    counts = Counter(e for _, e in placed(grouped(count), range(64)))
    assert set(counts) == set(range(count)) and counts.total() == 64 * 8
    assert max(counts.values()) - min(counts.values()) <= 1


@pytest.mark.parametrize("packed", [True, False])
def test_weights_are_shares_of_examples(packed):
    """Checks that a third source with four times as long examples changes tokens, not the count of examples."""
    weights = (0.5, 0.3, 0.2)
    streams = [stream(50, w, seed=i, low=5, high=9) for i, w in enumerate(weights[:2])]
    streams.append(stream(50, weights[2], seed=2, low=25, high=33))
    counts = Counter(i for i, _ in placed(plan(*streams, packed=packed, slots={"image": 16}), range(400)))
    total = sum(counts.values())
    for i, weight in enumerate(weights):
        assert counts[i] / total == pytest.approx(weight, abs=0.01)


def test_weights_need_not_add_up_to_one():
    one, other = (plan(stream(weight=w), stream(40, 3 * w, seed=1)) for w in (1.0, 0.1))
    assert [one.step(s) for s in range(8)] == [other.step(s) for s in range(8)]


def test_unusable_examples_never_appear():
    s = stream()
    s.lengths[::3] = 0
    seen = {e for _, e in placed(plan(s), range(200))}
    assert seen == set(np.flatnonzero(s.lengths).tolist())


def test_what_does_not_fit_is_counted():
    """Checks that a plan for more positions than there are leaves examples over and reports their share."""
    p = plan()
    p.fill = 1.25
    p._block.cache_clear()
    found = p.statistics(8)
    offered = len(p.orders[0].take(*p._bounds(0)[0]))
    kept = len(placed(p, range(8)))
    assert kept < offered
    assert found["left_over"] == pytest.approx((offered - kept) / offered)
    assert found["fill"] > 0.95


def test_statistics_agree_with_the_rows():
    s = stream()
    p = plan(s)
    pairs = placed(p, range(16))
    found = p.statistics(16)
    assert found["fill"] == pytest.approx(sum(s.lengths[e] for _, e in pairs) / (16 * 4 * 64))
    assert found["slot_fill"] == pytest.approx(sum(s.slots["image"][e] for _, e in pairs) / (16 * 4 * 6))
    assert found["examples_per_step"] == pytest.approx(len(pairs) / 16)


def test_rows_have_room_for_every_modality():
    """Checks that streams of images, of frames and of neither share rows, none with more than its slots of each."""
    shown, frames = stream(images=3), stream(images=5, seed=1)
    streams = (shown, Stream(frames.lengths, {"video": frames.slots["image"]}, 1.0), stream(images=0, seed=2))
    p = plan(*streams, slots={"image": 3, "video": 5})
    used = []
    for step in range(40):
        for row in p.step(step):
            used.append([sum(int(streams[i].taken(m)[e]) for i, e in row) for m in ("image", "video")])
    assert (np.max(used, axis=0) == [3, 5]).all()
    assert p.statistics(40)["left_over"] == 0


def test_text_only_needs_no_slots():
    p = plan(stream(images=0), slots={})
    assert p.statistics(8)["slot_fill"] == 0 and placed(p, range(8))


@pytest.mark.parametrize(
    "streams,change,given",
    [
        ([stream(), stream(low=65, high=66)], {}, "source 1: an example of 65 tokens"),
        ([stream(images=7)], {}, "one of 7 image slots"),
        ([stream(weight=0.0)], {}, "weight 0.0"),
        ([stream(weight=-1.0)], {}, "weight -1.0"),
        ([Stream(np.zeros(4, int), {"image": np.zeros(4, int)}, 1.0)], {}, "0 usable examples"),
        ([stream(low=33, high=36, images=0)], {}, "less than 60 %"),
    ],
    ids=["too long", "too many images", "no weight", "negative weight", "nothing usable", "pack badly"],
)
def test_refusals(streams, change, given):
    with pytest.raises(DataError) as refusal:
        plan(*streams, **change)
    assert given in refusal.value.given and refusal.value.expected and refusal.value.todo
