"""A few kills of the harness that otherwise does hundreds, and that it notices what it looks for."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import jax.numpy as jnp
import kill_and_resume
import pytest
from kill_and_resume import STEPS, complete, resumed_at

from mllm_jax.checkpoints.training import save_snapshot

HARNESS = Path(kill_and_resume.__file__)


@pytest.mark.slow
def test_three_kills_lose_nothing():
    paths = os.pathsep.join([str(HARNESS.parents[2]), str(HARNESS.parent)])
    command = [sys.executable, str(HARNESS), "--kills", "3", "--seed", "1"]
    done = subprocess.run(command, env=os.environ | {"PYTHONPATH": paths}, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "kills: 3;" in done.stdout and "lost checkpoints: 0; wrong resumes: 0" in done.stdout


def test_the_newest_safe_step_is_found_and_a_broken_folder_named(tmp_path):
    first = tmp_path / "checkpoints" / "0-stage0"
    assert complete(tmp_path) == (0, [])
    for step in (2, 4):
        save_snapshot(first / f"{step:08d}", {"x": jnp.full(4096, step)}, {})
    (first / "00000006.writing").mkdir()
    assert complete(tmp_path) == (4, [])
    save_snapshot(tmp_path / "stages" / "0-stage0", {"x": jnp.ones(4096)}, {})
    assert complete(tmp_path) == (STEPS, [])
    (first / "00000002" / "manifest.json").unlink()  # what is left of one that was being deleted
    assert complete(tmp_path) == (STEPS, [])
    largest = max((p for p in (first / "00000004").rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)
    largest.write_bytes(largest.read_bytes()[:-1])
    newest, (broken,) = complete(tmp_path)
    assert newest == STEPS and broken.startswith("checkpoints/0-stage0/00000004: ")


def test_where_a_start_went_on_is_read_from_what_it_said():
    assert resumed_at("stage stage0: trainable 1 MiB\n") == 0
    assert resumed_at("stage stage0: trainable 1 MiB\nstage stage0: resumed at step 6\n") == 6
    assert resumed_at("stage stage1: trainable 1 MiB\n") == STEPS
    assert resumed_at("stage stage1: trainable 1 MiB\nstage stage1: resumed at step 4\n") == STEPS + 4
