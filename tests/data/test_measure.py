"""Measuring: the same lengths by one process or several, at once or resumed, with processes that die."""

from __future__ import annotations

import mmap
import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from toy_measuring import Lines, encoder

from mllm_jax.data import measure as measuring
from mllm_jax.data import measured_files
from mllm_jax.data.measure import HowToMeasure, MeasuredLengths, measure
from mllm_jax.errors import ConfigError, DataError, ReadError
from mllm_jax.sharding.hosts import Share

SLOTS = {"image": 4}
BAD = ((7, "DataError"), (40, "DataError"))


@pytest.fixture(autouse=True)
def blocks_of_16(monkeypatch):
    monkeypatch.setattr(measured_files, "BLOCK", 16)


@pytest.fixture
def lines(tmp_path) -> Lines:
    return Lines(str(tmp_path / "log"), home=os.getpid())


def read(lines: Lines) -> list[int]:
    """Returns the indices that were read since the last call."""
    try:
        found = Path(lines.log).read_text().split()
    except FileNotFoundError:
        return []
    os.remove(lines.log)
    return list(map(int, found))


def expected(bad: tuple[int, ...] = ()) -> np.ndarray:
    letters = 1 + np.arange(100) % 9
    lengths = np.where(letters == 5, 15, letters)
    lengths[list(bad)] = 0
    return lengths


def check(found: MeasuredLengths, bad: tuple[int, ...] = ()) -> None:
    assert found.lengths.dtype == np.int32 and found.lengths.tolist() == expected(bad).tolist()
    assert found.slots["image"].tolist() == [2 * int(n == 15) for n in expected(bad)]
    assert [index for index, _ in found.bad] == list(bad)
    assert found.dropped_turns == (expected(bad) == 9).sum()


# ---- kept


def test_what_is_kept_is_not_measured_again(lines, tmp_path):
    how = HowToMeasure(tmp_path / "kept")
    check(measure(encoder(lines), SLOTS, how=how))
    assert read(lines) == list(range(100))
    found = measure(encoder(lines), SLOTS, how=how)
    check(found)
    assert not read(lines) and not found.lengths.flags.writeable
    held = found.lengths
    while isinstance(held.base, np.ndarray):
        held = held.base
    assert isinstance(held.base, mmap.mmap)
    assert sorted(path.name for path in (tmp_path / "kept").rglob("*") if path.is_file()) == ["facts.json", "table.npy"]
    measure(encoder(lines), {"image": 2}, how=how)
    assert not read(lines), "other slots are other rows, and no other lengths"
    for changed in (encoder(lines, length=4), encoder(replace(lines, size=99)), encoder(lines, captions=3)):
        measure(changed, SLOTS, how=how)
        assert len(read(lines)) >= 99
    check(measure(encoder(lines), SLOTS))
    assert len(read(lines)) == 100, "without a folder nothing is kept"


@pytest.mark.parametrize("after", [1, 3, 6])
def test_measuring_that_is_killed_continues_where_it_was(lines, tmp_path, monkeypatch, after):
    """Kills measuring after a number of blocks of 16, and while a block is written."""
    how, whole = HowToMeasure(tmp_path / "kept"), measured_files.MeasuredFiles.add

    def add(self, block):
        if block.number == after:
            file = next((tmp_path / "kept").rglob("blocks")) / "0000000.npz"
            (file.parent / ".half").write_bytes(file.read_bytes()[:100])
            raise KeyboardInterrupt
        whole(self, block)

    monkeypatch.setattr(measured_files.MeasuredFiles, "add", add)
    with pytest.raises(KeyboardInterrupt):
        measure(encoder(lines), SLOTS, how=how)
    monkeypatch.setattr(measured_files.MeasuredFiles, "add", whole)
    read(lines)
    check(measure(encoder(lines), SLOTS, how=how))
    assert read(lines) == list(range(16 * after, 100))


@pytest.mark.parametrize("kept", [0, 1, 2])
def test_a_kill_between_the_files_of_the_table_loses_nothing(lines, tmp_path, monkeypatch, kept):
    """Kills it after none, one or both of the table's files, with blocks beside them."""
    how, write, written = HowToMeasure(tmp_path / "kept"), measured_files.write_atomic, []

    def killed(path, content):
        if path.suffix != ".npz":
            if len(written) == kept:
                raise KeyboardInterrupt
            written.append(path)
        write(path, content)

    def stop(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(measured_files, "write_atomic", killed)
    monkeypatch.setattr(measured_files.shutil, "rmtree", stop)
    with pytest.raises(KeyboardInterrupt):
        measure(encoder(lines), SLOTS, how=how)
    monkeypatch.undo()
    monkeypatch.setattr(measured_files, "BLOCK", 16)
    assert len(read(lines)) == 100
    check(measure(encoder(lines), SLOTS, how=how))
    assert not read(lines)


@pytest.mark.parametrize("name", ["table.npy", "facts.json"])
def test_files_that_are_damaged_are_measured_again(lines, tmp_path, name):
    how = HowToMeasure(tmp_path / "kept")
    measure(encoder(lines), SLOTS, how=how)
    read(lines)
    (file,) = (tmp_path / "kept").rglob(name)
    file.write_bytes(file.read_bytes()[:50])
    check(measure(encoder(lines), SLOTS, how=how))
    assert len(read(lines)) == 100


def test_bad_examples_alone_are_measured_again_and_may_be_corrected(lines, tmp_path):
    how, allowed = HowToMeasure(tmp_path / "kept"), dict(max_bad_share=0.05)
    check(measure(encoder(replace(lines, raises=BAD)), SLOTS, how=how, **allowed), bad=(7, 40))
    for raises, bad in ((BAD, (7, 40)), (BAD[1:], (40,)), ((), ())):
        read(lines)
        found = measure(encoder(replace(lines, raises=raises)), SLOTS, how=how, **allowed)
        check(found, bad)
        assert all(f"lines[{index}]: line {index} is bad" in reason for index, reason in found.bad)
        assert len(read(lines)) <= 2
    check(measure(encoder(lines), SLOTS, how=how, **allowed))


def test_more_bad_examples_than_allowed_are_refused_by_name_and_the_good_ones_kept(lines, tmp_path):
    how = HowToMeasure(tmp_path / "kept")
    with pytest.raises(DataError, match=r"(?s)lines: 2 of 100 .*lines\[7\]: line 7 is bad.*lines\[40\].*at most 0.00%"):
        measure(encoder(replace(lines, raises=BAD)), SLOTS, how=how)
    read(lines)
    check(measure(encoder(lines), SLOTS, how=how))
    assert read(lines) == [7, 40]


def test_examples_with_more_media_than_slots_are_bad(lines, tmp_path):
    for _ in range(2):  # measured, and as stored
        how = HowToMeasure(tmp_path / "kept")
        found = measure(encoder(lines), {"image": 1}, how=how, max_bad_share=0.2)
        assert [index for index, _ in found.bad] == list(range(4, 100, 9))
        assert (found.lengths == np.where(expected() == 15, 0, expected())).all()
        assert "lines[4]: 2 image slots\n" in found.bad[0][1]
    with pytest.raises(DataError, match=r"lines: 11 of 100 (?s:.*)lines\[4\]: 2 image slots"):
        measure(encoder(lines), {}, how=how)


def test_a_source_that_is_bad_throughout_is_refused_early(lines, tmp_path, monkeypatch):
    monkeypatch.setattr(measuring, "_ENOUGH", 20)
    every = tuple((index, "DataError") for index in range(100))
    with pytest.raises(DataError, match="lines: at least 32 of 100"):
        measure(encoder(replace(lines, raises=every)), SLOTS)
    assert len(read(lines)) == 32


# ---- by several processes and hosts


def test_processes_find_what_one_does(lines, tmp_path):
    found = measure(encoder(lines), SLOTS, how=HowToMeasure(tmp_path / "kept", workers=2))
    check(found)
    assert sorted(read(lines)) == list(range(100))


def test_a_process_that_dies_once_is_replaced(lines):
    """Checks that its block is measured again, and that no example is lost or reported."""
    dying = replace(lines, dies_at=21, deaths=1)
    check(measure(encoder(dying), SLOTS, how=HowToMeasure(workers=2)))
    assert read(lines).count(21) == 2


def test_an_example_that_ends_every_process_is_named(lines):
    dying, how = replace(lines, dies_at=21, deaths=99), HowToMeasure(workers=2)
    found = measure(encoder(dying), SLOTS, how=how, max_bad_share=0.01)
    check(found, bad=(21,))
    assert "lines[21]: 3 processes that measured it ended (signal 9)" in found.bad[0][1]
    assert read(lines).count(21) == 3


def test_processes_that_die_at_one_example_and_another_are_no_fault_of_either(lines):
    dying = replace(lines, size=14, dies_at="anywhere", deaths=3)
    with pytest.raises(ReadError, match=r"3 processes that measured its records 0 to 13 ended \(signal 9\), not all"):
        measure(encoder(dying), SLOTS, how=HowToMeasure(workers=2))


@pytest.mark.parametrize("kind,error", [("ReadError", ReadError), ("a bug", ZeroDivisionError)])
def test_what_is_no_fault_of_an_example_ends_measuring(lines, kind, error):
    with pytest.raises(error) as raised:
        measure(encoder(replace(lines, raises=((50, kind),))), SLOTS, how=HowToMeasure(workers=2))
    assert any("in a process that measures" in note and "toy_measuring" in note for note in raised.value.__notes__)


class Shown:
    def __init__(self):
        self.stages, self.updates, self.messages = [], [], []

    def stage(self, name, total, start=0):
        self.stages.append((name, total, start))

    def update(self, step):
        self.updates.append(step)

    def message(self, text):
        self.messages.append(text)


@pytest.mark.parametrize("why", ["no pickle", "start"])
def test_what_no_other_process_can_measure_this_one_does(lines, why):
    """Checks a processor that cannot be sent, and a source that does not start there; a message reports it."""
    shown, held = Shown(), (lambda: None) if why == "no pickle" else None
    config = replace(lines, dies_at="start") if why == "start" else lines
    check(measure(encoder(config, held), SLOTS, how=HowToMeasure(workers=2, progress=shown)))
    (said,) = shown.messages
    assert said.startswith("lines is measured in one process: ")
    assert ("a process ended with -9" in said) == (why == "start")


def test_a_bar_counts_examples(lines, monkeypatch):
    """Checks a source that takes a while; a small one shows no bar."""
    shown = Shown()
    check(measure(encoder(lines), SLOTS, how=HowToMeasure(progress=shown)))
    assert not shown.stages and not shown.updates
    monkeypatch.setattr(measuring, "SMALL", 10)
    monkeypatch.setattr(measuring, "SHOWN", -1.0)
    check(measure(encoder(lines), SLOTS, how=HowToMeasure(progress=shown)))
    assert shown.stages == [("measure lines", 100, 16)] and shown.updates == [32, 48, 64, 80, 96, 100]


def test_each_host_measures_its_share_into_one_folder(lines, tmp_path):
    """Runs two hosts, the second first: it measures its own blocks, and refuses because the others are missing.

    Each measures the same blocks, also if it begins after the other one has stored some.
    """
    first, second = (HowToMeasure(tmp_path / "kept", hosts=Share(index, 2)) for index in range(2))
    with pytest.raises(ConfigError, match="which lacks those that the other processes measured"):
        measure(encoder(lines), SLOTS, how=second)
    assert read(lines) == [*range(16, 32), *range(48, 64), *range(80, 96)]
    check(measure(encoder(lines), SLOTS, how=first))
    assert read(lines) == [*range(16), *range(32, 48), *range(64, 80), *range(96, 100)]
    check(measure(encoder(lines), SLOTS, how=second))
    assert not read(lines)


def test_no_host_merges_while_another_one_reads(lines, tmp_path, monkeypatch):
    """Reads on the second host; between its two reads the first one merges as soon as nothing makes it wait."""
    first, second = (HowToMeasure(tmp_path / "kept", hosts=Share(index, 2)) for index in range(2))
    with pytest.raises(ConfigError, match="which lacks"):
        measure(encoder(lines), SLOTS, how=first)
    read_table, others_wait, merged = measured_files.MeasuredFiles._read_table, [True], []

    def together(work):
        others_wait[0] = True
        work()
        others_wait[0] = False

    def slowly(self):
        read_table(self)
        if not others_wait[0] and not merged:
            merged.append(True)
            measured_files.MeasuredFiles(self.folder, self.count, self.modalities).merge()

    monkeypatch.setattr(measuring, "together", together)
    monkeypatch.setattr(measured_files.MeasuredFiles, "_read_table", slowly)
    check(measure(encoder(lines), SLOTS, how=second))
    assert merged, "the first one had no opportunity"
