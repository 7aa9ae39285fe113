"""Progress of a command over many items: a bar in a terminal, plain lines in a pipe."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from datetime import timedelta
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console


class Count:
    """Progress on standard error: the number of `total` items that are done, items a second, and the time left.

    Speed and time left are measured from the first update on, so that compilation does not count.

    Args:
        unit: name of the items, in the plural.
        done: number of items that an earlier process has done.
        interval: seconds between plain lines.
        clock: seconds, monotonic.
    """

    def __init__(
        self,
        unit: str,
        total: int,
        done: int = 0,
        *,
        console: Console | None = None,
        interval: float = 10.0,
        clock: Callable[[], float] = time.monotonic,
    ):
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

        self._unit, self._total, self._interval, self._clock = unit, total, interval, clock
        self._console = console or Console(stderr=True)
        self._mark: tuple[int, float] | None = None
        self._printed, self._bars = -math.inf, None
        if self._console.is_terminal and not self._console.is_dumb_terminal:
            columns = (
                TextColumn(unit),
                BarColumn(bar_width=None),
                MofNCompleteColumn(),
                TextColumn("{task.fields[speed]}"),
            )
            self._bars = Progress(*columns, console=self._console, expand=True)
            self._task = self._bars.add_task("", total=total, completed=done, speed="")

    def __enter__(self) -> Count:
        if self._bars:
            self._bars.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._bars:
            self._bars.stop()

    def update(self, done: int) -> None:
        """Shows that `done` items are done."""
        now = self._clock()
        mark, at = self._mark = self._mark or (done, now)
        speed = (done - mark) / (now - at) if now > at else 0.0
        parts = [f"{speed:.3g} {self._unit}/s"] if speed else []
        if speed and done < self._total:
            parts.append(f"ETA {timedelta(seconds=round((self._total - done) / speed))}")
        if self._bars:
            self._bars.update(self._task, completed=done, speed="  ".join(parts))
        elif done >= self._total or now - self._printed >= self._interval:
            self._printed = now
            self.message("  ".join([f"{done}/{self._total} {self._unit}", *parts]))

    def message(self, text: str) -> None:
        """Prints a line without tearing the bar."""
        self._console.print(text, markup=False, highlight=False, soft_wrap=True, emoji=False)
