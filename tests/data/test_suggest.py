"""Rows proposed from sizes, for samples by hand and by the command for a config."""

from __future__ import annotations

import numpy as np
import pytest

from mllm_jax.data.suggest import Candidate, Sizes, best, candidates, judge, rows_for
from mllm_jax.errors import DataError


def sizes(*lengths: int, least=None, **slots: list[int]) -> Sizes:
    return Sizes(
        np.array(lengths), np.array(lengths if least is None else least), {m: np.array(n) for m, n in slots.items()}
    )


def test_fill_and_the_examples_that_a_row_loses():
    # 60 and 40 fill a row of 100; 90 has one alone; 300 can be shortened to 50, which fits beside 40 only.
    sample = sizes(60, 40, 90, 300, 40, least=[60, 40, 90, 50, 40], image=[1, 1, 1, 1, 1])
    judged = judge(sample, 100)
    assert (judged.shortened, judged.refused) == (0.2, 0.0) and judged.slots == {"image": 2}
    assert judged.fill == pytest.approx(280 / 300)
    assert judge(sample, 80).refused == pytest.approx(0.2), "90 has no shorter form"
    assert judge(sample, 100, {"image": 1}).fill == pytest.approx(280 / 500), "a row for each"
    assert judge(sample, 100, {}).refused == 1.0 and judge(sample, 100, {}).fill == 0.0
    assert judge(sample, 300, packed=False).fill == pytest.approx(np.mean([60, 40, 90, 300, 40]) / 300)


def test_slots_are_as_few_as_fill_the_rows():
    """Checks patches: half of the examples have 48 of them; texts fill the rest, so that all rows need some."""
    sample = sizes(*[50] * 40, *[25] * 40, image=[48] * 40 + [0] * 40)
    judged = judge(sample, 100)
    assert judged.fill > 0.95 and judged.slots == {"image": 96}
    assert judge(sizes(*[50] * 8), 100).slots == {}, "text alone"


def test_the_shortest_of_the_fullest_that_loses_almost_no_example():
    wide = dict(slots={"image": 2})
    losing = Candidate(64, fill=0.99, shortened=0.5, refused=0.0, **wide)
    refusing = Candidate(96, fill=1.0, shortened=0.0, refused=0.1, **wide)
    good = Candidate(128, fill=0.955, shortened=0.005, refused=0.0, **wide)
    longer = Candidate(256, fill=0.96, shortened=0.0, refused=0.0, **wide)
    empty = Candidate(512, fill=0.4, shortened=0.0, refused=0.0, **wide)
    assert best([losing, refusing, good, longer, empty]) is good
    assert best([refusing, Candidate(80, fill=0.2, shortened=1.0, refused=0.05, **wide)]).refused == 0.05


def test_candidates_lie_between_a_usual_and_several_longest_examples():
    rng = np.random.default_rng(0)
    found = candidates(sizes(*rng.integers(40, 400, 300)))
    lengths = [each.length for each in found]
    assert lengths == sorted(set(lengths)) and 220 <= lengths[0] <= 256 and 1024 <= lengths[-1] <= 1600
    assert best(found).refused == 0 and best(found).fill > 0.95
    assert all(each.length % 96 == 0 for each in candidates(sizes(*rng.integers(40, 400, 30)), unit=6))
    assert [each.length for each in candidates(sizes(7, 7, 7))] == [32]


def test_a_batch_keeps_its_tokens():
    proposed = Candidate(128, {}, 1.0, 0.0, 0.0)
    assert (rows_for(proposed, 8, 256), rows_for(proposed, 8, 256, unit=12), rows_for(proposed, 1, 16)) == (16, 12, 1)


def test_nothing_to_judge():
    with pytest.raises(DataError, match="a sample without an example"):
        sizes()
