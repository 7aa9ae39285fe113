"""A process that hangs prints the stack of every thread and exits; one that lives continues."""

from __future__ import annotations

import subprocess
import sys
import threading
from pathlib import Path

from mllm_jax.training.operations.watchdog import HANG_EXIT, Watchdog

ROOT = Path(__file__).parents[3]


class Clock:
    """Replacement of the module's `time`, moved by hand; it records when the watching thread reads it."""

    def __init__(self):
        self.now, self.looks = 100.0, threading.Semaphore(0)

    def monotonic(self) -> float:
        if threading.current_thread().name == "watchdog":
            self.looks.release()
        return self.now


def test_a_beating_run_is_let_be(tmp_path, monkeypatch):
    codes, clock = [], Clock()
    monkeypatch.setattr("mllm_jax.training.operations.watchdog.time", clock)
    with Watchdog(tmp_path / "hangs", 0.4, end=codes.append) as watchdog:
        for step in range(8):
            clock.now += 0.3
            watchdog.beat(f"step {step}")
            assert clock.looks.acquire(timeout=50) and clock.looks.acquire(timeout=50)
    clock.now += 100
    assert codes == [] and not (tmp_path / "hangs").exists()


def test_none_watches_with_zero_seconds(tmp_path):
    threads = threading.active_count()
    with Watchdog(tmp_path, 0):
        assert threading.active_count() == threads


def test_a_hang_ends_the_process_with_all_stacks(tmp_path):
    code = f"""
import threading, time, types
from pathlib import Path
from mllm_jax.training.operations import watchdog

waits, now = threading.Event(), 0.0

def waits_for_a_bucket():
    waits.set()
    threading.Event().wait()

threading.Thread(target=waits_for_a_bucket, daemon=True).start()
waits.wait()
watchdog.time = types.SimpleNamespace(monotonic=lambda: now, strftime=time.strftime)
with watchdog.Watchdog(Path({str(tmp_path / "hangs")!r}), 0.3) as watch:
    watch.beat("step 7 of stage align")
    now = 1.0
    threading.Event().wait()
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=50)
    assert done.returncode == HANG_EXIT, done.stderr
    (file,) = (tmp_path / "hangs").iterdir()
    assert file.name.startswith("process-0-")
    for text in (done.stderr, file.read_text()):
        assert "process 0 of 1: no step finished" in text and "the last sign of life: step 7 of stage align" in text
        assert "waits_for_a_bucket" in text and "most recent call first" in text
