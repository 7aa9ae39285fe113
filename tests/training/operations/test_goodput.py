"""Goodput: every second counts once, over restarts, and repeated steps count as lost."""

from __future__ import annotations

import json

import pytest

from mllm_jax.errors import RunFolderError
from mllm_jax.training.operations.goodput import KINDS, Goodput


class Time:
    """Both clocks, moved by hand."""

    def __init__(self, now: float = 100.0):
        self.now = now

    def __call__(self) -> float:
        return self.now


def account(file, time: Time) -> Goodput:
    return Goodput(file, clock=time, wall=time)


def test_every_second_belongs_to_the_innermost_kind(tmp_path):
    time = Time()
    it = account(tmp_path / "goodput.json", time)
    time.now += 1
    with it.spending("productive"):
        time.now += 2
        with it.spending("checkpoint"):
            time.now += 4
        time.now += 8
        with it.spending("compile"):
            time.now += 16
    time.now += 32
    it.write()
    seconds = json.loads((tmp_path / "goodput.json").read_text())["seconds"]
    expected = {"productive": 10, "checkpoint": 4, "compile": 16, "other": 33}
    assert seconds == dict.fromkeys(KINDS, 0.0) | expected
    assert it.timing()["goodput"] == pytest.approx(10 / 63) and it.timing()["checkpoint_seconds"] == 4


def test_a_wait_counts_only_while_nothing_was_computed(tmp_path):
    time = Time()
    it = account(None, time)
    busy = iter([True, False, False])

    def batches():
        for i in range(2):
            time.now += 3
            yield i
        time.now += 100  # the end of the batches is not a wait for one

    with it.spending("productive"):
        given = []
        for batch in it.waited(batches(), lambda: next(busy)):
            given.append(batch)
            time.now += 10
    assert given == [0, 1]
    assert it.seconds["input"] == 3 and it.seconds["productive"] == 3 + 2 * 10 + 100


def train(it: Goodput, time: Time, steps, *, saved=()):
    with it.spending("productive"):
        for step in steps:
            time.now += 10
            it.reached(step, saved=step in saved)


def test_after_a_kill_the_steps_done_again_are_lost_and_the_gap_is_down(tmp_path):
    time, file = Time(), tmp_path / "goodput.json"
    it = account(file, time)
    it.resumed(0)
    train(it, time, range(1, 8), saved=(3, 6))  # killed after step 7, whose line was written
    time.now += 50
    again = account(file, time)
    assert again.starts == 2 and again.seconds["down"] == 50
    time.now += 5
    again.resumed(6)
    assert again.seconds["lost"] == 10 and again.seconds["productive"] == 60
    train(again, time, (7, 8), saved=(8,))
    again.write(finished=True)
    assert again.seconds == dict.fromkeys(KINDS, 0.0) | {"productive": 80, "lost": 10, "down": 50, "other": 5}
    time.now += 1000
    assert account(file, time).seconds["down"] == 50, "after the end nothing is down"


def test_an_older_checkpoint_loses_more_and_a_step_without_a_mark_its_share(tmp_path):
    time, file = Time(), tmp_path / "goodput.json"
    it = account(file, time)
    it.resumed(0)
    train(it, time, range(1, 11), saved=(3, 6, 9))
    older = account(file, time)
    older.resumed(3)
    assert older.seconds["lost"] == 70 and older.seconds["productive"] == 30
    train(older, time, range(4, 9))
    between = account(file, time)
    between.resumed(4)  # from a checkpoint that was saved before the account recorded it
    assert between.seconds["lost"] == 70 + 40 and between.seconds["productive"] == 40


def test_the_file_is_written_once_a_second_and_whole(tmp_path):
    time, file = Time(), tmp_path / "goodput.json"
    it = account(file, time)
    it.reached(1)
    first = file.read_text()
    time.now += 0.5
    it.reached(2)
    assert file.read_text() == first
    time.now += 0.6
    it.reached(3)
    assert json.loads(file.read_text())["step"] == 3 and [p.name for p in tmp_path.iterdir()] == ["goodput.json"]


@pytest.mark.parametrize("text", ["", "[]", '{"wall": 1}', '{"wall": 1, "seconds": {"productive": -1}}'])
def test_a_broken_account_is_refused_by_name(tmp_path, text):
    (tmp_path / "goodput.json").write_text(text)
    with pytest.raises(RunFolderError, match="goodput.json.*\n.*\n.*remove the file"):
        Goodput(tmp_path / "goodput.json")
