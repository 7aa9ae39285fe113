"""Progress reads well on a terminal and in a log."""

from __future__ import annotations

import io

from rich.console import Console

from mllm_jax.training.operations.progress import Progress


class Clock:
    def __init__(self):
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def plain(**options) -> tuple[Progress, Clock, io.StringIO]:
    clock, out = Clock(), io.StringIO()
    return Progress(console=Console(file=out, width=40), clock=clock, **options), clock, out


def test_plain_lines_come_every_interval_and_at_the_end():
    progress, clock, out = plain(interval=10)
    with progress:
        progress.stage("align", 50)
        for step in range(1, 51):
            clock.now += 1
            progress.update(step, loss=1 / step, tokens_per_second=12_345, flops_per_second=3.21e9)
    lines = out.getvalue().splitlines()
    assert [line.split()[1] for line in lines] == ["1/50", "11/50", "21/50", "31/50", "41/50", "50/50"]
    assert lines[1] == "align  11/50  loss 0.0909  12.3k tokens/s  3.2 GFLOP/s  ETA 0:39"
    assert lines[-1].endswith("took 0:50")


def test_mfu_needs_a_peak_and_first_step_does_not_count_for_the_time_left():
    progress, clock, out = plain(peak=1e12, interval=0)
    progress.stage("instruct", 4000, start=1000)
    clock.now += 300  # compilation
    progress.update(1001, loss=float("nan"))
    clock.now += 2
    progress.update(1003, flops_per_second=4e11)
    first, second = out.getvalue().splitlines()
    assert first == "instruct  1001/4000  loss nan"
    assert second == "instruct  1003/4000  loss nan  MFU 40.0%  ETA 49:57"


def test_the_bar_shows_every_column_on_a_terminal():
    out = io.StringIO()
    progress = Progress(console=Console(file=out, force_terminal=True, width=140, color_system=None, _environ={}))
    with progress:
        progress.stage("align[x]", 20)
        progress.update(1, loss=2.0)
        progress.message("checkpoint [1]")
        progress.update(20, loss=1.5, tokens_per_second=900, flops_per_second=2e12)
    text = out.getvalue()
    for shown in ("align[x]", "20/20", "loss 1.5000", "900 tokens/s", "2.0 TFLOP/s", "took 0:00", "checkpoint [1]"):
        assert shown in text
