"""Training on the screen: a progress bar, or plain lines if the output is not a terminal."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console

FIELDS = ("loss", "seconds", "tokens", "flops", "mfu", "left")
WIDE = 120  # columns of a terminal; a narrower one shows the bar without FLOP/s


class Progress:
    """A progress bar for each stage, or a plain line every `interval` seconds if the output is not a terminal.

    Shows loss, seconds a step, tokens/s and model FLOP/s of one device, MFU (the share of its peak, if that is known)
    and the time left, which is measured from a stage's first update on, so that compilation does not count.

    Args:
        console: where to print; standard output by default.
        quiet: print nothing, for every process but the first.
        interval: seconds between plain lines.
        clock: seconds, monotonic; tests pass their own.
    """

    def __init__(
        self,
        *,
        console: Console | None = None,
        quiet: bool = False,
        interval: float = 10.0,
        clock: Callable[[], float] = time.monotonic,
    ):
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, TextColumn
        from rich.progress import Progress as Bars

        self._console = console or Console(quiet=quiet)
        self._interval, self._clock = interval, clock
        self._bars = None
        if self._console.is_terminal and not self._console.is_dumb_terminal:
            wide = self._console.width >= WIDE
            columns = [TextColumn("[bold]{task.description}"), BarColumn(bar_width=None), MofNCompleteColumn()]
            columns += [TextColumn(f"{{task.fields[{name}]}}") for name in FIELDS if name != "flops" or wide]
            self._bars = Bars(*columns, console=self._console, expand=True)
        self._name = ""

    def __enter__(self) -> Progress:
        if self._bars:
            self._bars.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._bars:
            self._bars.stop()

    def stage(self, name: str, total: int, start: int = 0) -> None:
        """Begins a stage of `total` steps, of which an earlier process has done `start`."""
        self._name, self._total, self._start = name, total, start
        self._began, self._mark, self._printed = self._clock(), None, -math.inf
        self._fields = dict.fromkeys(FIELDS, "")
        if self._bars:
            self._task = self._bars.add_task(_escaped(name), total=total, completed=start, **self._fields)

    def update(
        self,
        step: int,
        *,
        loss: float | None = None,
        timing: Mapping[str, float] | None = None,
        last: bool = False,
    ) -> None:
        """Shows that `step` steps of the stage are done; a figure left out keeps its last value.

        Args:
            step: steps done in this stage, at most its total.
            loss: the latest loss.
            timing: see `Meter.timing`.
            last: the stage ends here, before its total.
        """
        now, timing = self._clock(), timing or {}
        if self._mark is None:
            self._mark = (step, now)
        fields = self._fields
        if loss is not None:
            fields["loss"] = f"loss {float(loss):.4f}"
        if (seconds := timing.get("seconds_per_step")) is not None:
            fields["seconds"] = f"{seconds:.3g} s/step"
        if (tokens := timing.get("tokens_per_second_per_device")) is not None:
            fields["tokens"] = f"{_metric(tokens)} tokens/s/device"
        if (flops := timing.get("flops_per_second_per_device")) is not None:
            fields["flops"] = f"{_metric(flops, ' ')}FLOP/s/device"
        if (mfu := timing.get("mfu")) is not None:
            fields["mfu"] = f"MFU {mfu:.1%}"
        done, at = self._mark
        if last or step >= self._total:
            fields["left"] = f"took {_duration(now - self._began)}"
        elif step > done:
            fields["left"] = f"ETA {_duration((self._total - step) * (now - at) / (step - done))}"
        if self._bars:
            self._bars.update(self._task, completed=step, **fields)
        elif last or step >= self._total or now - self._printed >= self._interval:
            self._printed = now
            parts = [self._name, f"{step}/{self._total}", *filter(None, fields.values())]
            self._console.print("  ".join(parts), markup=False, highlight=False, soft_wrap=True)

    def message(self, text: str) -> None:
        """Prints a line without tearing the bar."""
        self._console.print(text, markup=False, highlight=False, soft_wrap=True)


def _escaped(text: str) -> str:
    from rich.markup import escape

    return escape(text)


def _metric(value: float, space: str = "") -> str:
    """Formats `12300` as `"12.3k"`; `space` goes before the SI prefix, if a unit follows it, as in `"3.2 GFLOP/s"`."""
    for size, prefix in ((1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= size:
            return f"{value / size:.1f}{space}{prefix}"
    return f"{value:.0f}{space}"


def _duration(seconds: float) -> str:
    minutes, second = divmod(round(seconds), 60)
    hours, minute = divmod(minutes, 60)
    return f"{hours}:{minute:02d}:{second:02d}" if hours else f"{minute}:{second:02d}"
