"""Progress reads well on a terminal and in a log."""

from __future__ import annotations

import io

from rich.console import Console

from mllm_jax.training.operations.meter import Meter
from mllm_jax.training.operations.progress import Progress

TIMING = {"seconds_per_step": 0.2131, "tokens_per_second_per_device": 12_345, "flops_per_second_per_device": 3.21e9}


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
            progress.update(step, loss=1 / step, timing=TIMING)
    lines = out.getvalue().splitlines()
    assert [line.split()[1] for line in lines] == ["1/50", "11/50", "21/50", "31/50", "41/50", "50/50"]
    shown = "loss 0.0909  0.213 s/step  12.3k tokens/s/device  3.2 GFLOP/s/device"
    assert lines[1] == f"align  11/50  {shown}  ETA 0:39"
    assert lines[-1].endswith("took 0:50")


def test_mfu_is_shown_where_it_is_known_and_first_step_does_not_count_for_the_time_left():
    progress, clock, out = plain(interval=0)
    progress.stage("instruct", 4000, start=1000)
    clock.now += 300  # compilation
    progress.update(1001, loss=float("nan"))
    clock.now += 2
    progress.update(1003, timing={"mfu": 0.4})
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
        progress.update(20, loss=1.5, timing=TIMING | {"flops_per_second_per_device": 2e12, "mfu": 0.5})
    text = out.getvalue()
    for shown in ("align[x]", "20/20", "loss 1.5000", "0.213 s/step", "12.3k tokens/s/device", "2.0 TFLOP/s/device"):
        assert shown in text
    for shown in ("MFU 50.0%", "took 0:00", "checkpoint [1]"):
        assert shown in text


def test_a_narrow_terminal_leaves_flops_out():
    out = io.StringIO()
    progress = Progress(console=Console(file=out, force_terminal=True, width=100, color_system=None, _environ={}))
    with progress:
        progress.stage("align", 20)
        progress.update(20, loss=1.5, timing=TIMING)
    assert "12.3k tokens/s/device" in out.getvalue() and "FLOP" not in out.getvalue()


def test_a_stage_that_ends_early_has_a_last_line():
    progress, clock, out = plain(interval=1000)
    progress.stage("align", 50)
    progress.update(1)
    clock.now += 4
    progress.update(2, loss=1.0, last=True)
    assert out.getvalue().splitlines()[-1] == "align  2/50  loss 1.0000  took 0:04"


def test_the_meter_gives_figures_of_one_device_and_leaves_pauses_out():
    clock = Clock()
    meter = Meter(flops=8_000, devices=2, peak=10_000.0, clock=clock)
    for seconds in (100, 0.5, 0.5):  # the first step compiles
        clock.now += seconds
        meter.tick(40)
    meter.pause()
    for seconds in (50, 0.5):  # the next step waits for a validation
        clock.now += seconds
        meter.tick(40)
    assert meter.timing() == {
        "seconds_per_step": 0.5,
        "tokens_per_second": 80.0,
        "flops_per_second": 16_000.0,
        "tokens_per_second_per_device": 40.0,
        "flops_per_second_per_device": 8_000.0,
        "mfu": 0.8,
    }
    assert Meter(flops=1).timing() == {} and Meter(flops=1).tokens_rate is None
