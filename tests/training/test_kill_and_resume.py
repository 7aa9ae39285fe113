"""A few kills of the harness, which can do hundreds; and the faults that it must find."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import kill_and_resume
import pytest
from kill_account import OPERATIONS, Found, examine, keep_account, read_account
from kill_and_resume import STEPS, resumed_at

HARNESS = Path(kill_and_resume.__file__)


@pytest.mark.slow
def test_three_kills_lose_nothing():
    paths = os.pathsep.join([str(HARNESS.parents[2]), str(HARNESS.parent)])
    command = [sys.executable, str(HARNESS), "--kills", "3", "--seed", "1"]
    done = subprocess.run(command, env=os.environ | {"PYTHONPATH": paths}, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "kills: 3;" in done.stdout and "lost checkpoints: 0; wrong resumes: 0" in done.stdout


def checkpoint(folder: Path, step: str, size: int = 8) -> None:
    """Makes a checkpoint of two files as the library does: filled under another name, then renamed."""
    target = folder / step
    writing = target.with_name(target.name + ".writing")
    writing.mkdir(parents=True)
    (writing / "data").write_bytes(step.encode() * size)
    (writing / "manifest.json").write_text(step)
    os.rename(writing, target)


@pytest.fixture
def run(tmp_path, monkeypatch):
    """Makes a folder with checkpoints 2, 4 (the best), 6 and 8 of stage 0, and its journal."""
    for name in OPERATIONS:
        monkeypatch.setattr(os, name, getattr(os, name))  # restores the real ones at the end
    folder = tmp_path / "run"
    keep_account(folder, tmp_path / "journal")
    for step in (2, 4, 6, 8):
        checkpoint(folder, f"checkpoints/0-stage0/{step:08d}")
    (folder / "checkpoints" / "0-stage0" / "00000010.writing").mkdir()

    def look() -> Found:
        account = read_account(tmp_path / "journal")
        return examine(folder, account, stages=2, steps=STEPS, keep=2, scores={4: 1.0, 8: 2.0, 12: 0.5})

    return folder, look


def test_what_must_be_there_is_known_without_the_library(run):
    folder, look = run
    assert look() == Found(8, [], [])
    checkpoint(folder, "stages/0-stage0")
    assert look() == Found(STEPS, [], [])
    checkpoint(folder, "checkpoints/1-stage1/00000002")
    assert look() == Found(STEPS + 2, [], [])


def test_an_old_one_may_go_but_not_in_part_with_its_manifest(run):
    folder, look = run
    old = folder / "checkpoints" / "0-stage0" / "00000002"
    (old / "manifest.json").unlink()
    assert look() == Found(8, [], ["checkpoints/0-stage0/00000002"])
    shutil.rmtree(old)
    assert look() == Found(8, [], [])
    old.mkdir()
    (old / "manifest.json").write_text("checkpoints/0-stage0/00000002")
    assert look().faults == ["checkpoints/0-stage0/00000002: not as it was named: data"]


@pytest.mark.parametrize("step", [4, 6, 8])
@pytest.mark.parametrize("hurt", ["gone", "manifest.json", "data"])
def test_the_newest_two_and_the_best_must_be_whole(run, step, hurt):
    folder, look = run
    path = folder / "checkpoints" / "0-stage0" / f"{step:08d}"
    if hurt == "data":
        (path / "data").write_bytes(b"x" + (path / "data").read_bytes()[1:])
    elif hurt == "gone":
        shutil.rmtree(path)
    else:
        (path / hurt).unlink()
    (fault,) = look().faults
    assert fault.startswith(f"checkpoints/0-stage0/{step:08d}: not as it was named: ")
    assert look().newest == 8, "where the next start must go on is another question"


def test_a_kill_before_the_name_or_before_the_note_of_it(run):
    folder, look = run
    journal = folder.with_name("journal")
    lines = journal.read_text()
    cut = lines[: lines.rindex('"what": "named"') - 1]  # checkpoint 8 exists, its record does not
    journal.write_text(cut + '{"what": "nam')
    assert look() == Found(8, [], [])
    shutil.rmtree(folder / "checkpoints" / "0-stage0" / "00000008")  # now it did not get its name
    assert look() == Found(6, [], [])
    assert read_account(journal).writing == "checkpoints/0-stage0/00000008"
    (folder / "checkpoints" / "0-stage0" / "00000012").mkdir()
    assert look().faults == ["checkpoints/0-stage0/00000012: it was never about to get this name"]


def test_a_process_kills_itself_at_the_operation_that_it_was_told(tmp_path):
    code = """
        import os, sys
        from pathlib import Path
        from kill_account import keep_account

        folder = Path(sys.argv[1])
        keep_account(folder, folder / "journal", death=(1, 1))
        for step in ("00000002", "00000004"):
            os.mkdir(folder / f"{step}.writing")
            os.rename(folder / f"{step}.writing", folder / step)
    """
    command = [sys.executable, "-c", textwrap.dedent(code), str(tmp_path)]
    killed = subprocess.run(command, env=os.environ | {"PYTHONPATH": str(HARNESS.parent)}, timeout=60)
    assert killed.returncode == -signal.SIGKILL
    account = read_account(tmp_path / "journal")
    assert account.named == {"00000002"} and account.writing == "00000004"
    assert sorted(path.name for path in tmp_path.glob("0*")) == ["00000002", "00000004.writing"]


def test_where_a_start_went_on_is_read_from_what_it_said():
    assert resumed_at("stage stage0: trainable 1 MiB\n") == 0
    assert resumed_at("stage stage0: trainable 1 MiB\nstage stage0: resumed at step 6\n") == 6
    assert resumed_at("stage stage1: trainable 1 MiB\n") == STEPS
    assert resumed_at("stage stage1: trainable 1 MiB\nstage stage1: resumed at step 4\n") == STEPS + 4
