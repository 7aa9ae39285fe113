"""A process that hangs tells where every thread stands and ends; one that lives is let be."""

from __future__ import annotations

import subprocess
import sys
import threading
import time
from pathlib import Path

from mllm_jax.training.watchdog import HANG_EXIT, Watchdog

ROOT = Path(__file__).parents[2]


def test_a_beating_run_is_let_be(tmp_path):
    codes = []
    with Watchdog(tmp_path / "hangs", 0.4, end=codes.append) as watchdog:
        for step in range(8):
            time.sleep(0.1)
            watchdog.beat(f"step {step}")
    time.sleep(0.5)
    assert codes == [] and not (tmp_path / "hangs").exists()


def test_none_watches_with_zero_seconds(tmp_path):
    threads = threading.active_count()
    with Watchdog(tmp_path, 0):
        assert threading.active_count() == threads


def test_a_hang_ends_the_process_with_all_stacks(tmp_path):
    code = f"""
import threading, time
from pathlib import Path
from mllm_jax.training.watchdog import Watchdog

def waits_for_a_bucket():
    time.sleep(60)

threading.Thread(target=waits_for_a_bucket, daemon=True).start()
with Watchdog(Path({str(tmp_path / "hangs")!r}), 0.3) as watchdog:
    watchdog.beat("step 7 of stage align")
    time.sleep(60)
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=50)
    assert done.returncode == HANG_EXIT, done.stderr
    (file,) = (tmp_path / "hangs").iterdir()
    assert file.name.startswith("process-0-")
    for told in (done.stderr, file.read_text()):
        assert "process 0 of 1: no step finished" in told and "the last that was heard: step 7 of stage align" in told
        assert "waits_for_a_bucket" in told and "most recent call first" in told
