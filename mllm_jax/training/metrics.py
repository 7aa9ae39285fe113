"""What a run tells while it trains: metrics.jsonl, TensorBoard events and a progress bar."""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from mllm_jax.errors import RunFolderError, TrainingError
from mllm_jax.files import write_atomic

if TYPE_CHECKING:
    from rich.console import Console

RESERVED = frozenset({"step", "stage", "timing"})
TENSORBOARD_FLUSH_SECONDS = 15.0


# --------------------------------------------------------------------------------------------------
# Files
# --------------------------------------------------------------------------------------------------


class MetricsWriter:
    """metrics.jsonl and TensorBoard events of one run folder.

    A line is `{"step": int, "stage": str, <values>, "timing": {...}}` and reaches the operating system before `write`
    returns, so a killed process loses none. `timing` stands apart because it alone differs between equal runs.
    One process of a run writes; `step` counts over all stages.

    Args:
        folder: the run folder; made if absent. Events go to `folder/tensorboard`.
        resume_from: the step of the checkpoint the run goes on from. Lines up to it stay, later ones are dropped
            (the resumed run writes them again) and TensorBoard is told to forget them.

    Raises:
        RunFolderError: the folder cannot be written, or a line other than the last is not a metrics line.
    """

    def __init__(self, folder: Path, *, resume_from: int = 0):
        from tensorboardX.event_file_writer import EventsWriter
        from tensorboardX.proto import event_pb2, summary_pb2

        self.path = Path(folder) / "metrics.jsonl"
        self._event, self._summary = event_pb2.Event, summary_pb2.Summary
        try:
            events = Path(folder) / "tensorboard"
            events.mkdir(parents=True, exist_ok=True)
            _keep_until(self.path, resume_from)
            self._lines = self.path.open("ab")
            # tensorboardX names files by the whole second and truncates an equal name: a quick resume needs its own.
            # Its SummaryWriter is passed by, for it hands each value through a process queue that blocks for ever
            # once its thread has died of a full disk.
            self._events = EventsWriter(str(events / "events"), f".{resume_from:010d}.{os.getpid()}")
        except OSError as error:
            raise _unwritable(self.path, error) from error
        purge = event_pb2.SessionLog(status=event_pb2.SessionLog.START)
        self._events.write_event(event_pb2.Event(step=resume_from + 1, wall_time=time.time(), session_log=purge))
        self._flushed = time.monotonic()

    def write(self, step: int, stage: str, values: Mapping[str, float], timing: Mapping[str, float]) -> None:
        """Appends one line and one TensorBoard event.

        Args:
            step: steps done so far, over all stages.
            stage: the stage's name; TensorBoard groups by it.
            values: numbers the run is judged by; scalars of any kind that `float` takes, kept exactly.
            timing: seconds, tokens/s and other figures that differ from machine to machine.

        Raises:
            TrainingError: a value is named like a field of the line.
            RunFolderError: the file cannot be written, as when the disk is full.
        """
        if clash := RESERVED & values.keys():
            raise TrainingError(
                f"metrics named {sorted(clash)} at step {step}",
                f"names other than {sorted(RESERVED)}, which each metrics line uses itself",
                "rename the metric in the objective that returns it",
            )
        numbers = {name: float(value) for name, value in values.items()}
        times = {name: float(value) for name, value in timing.items()}
        # JSON has no NaN: a bare one would make the whole file unreadable for strict readers.
        line = {"step": int(step), "stage": stage, **_spelled(numbers), "timing": _spelled(times)}
        tagged = [(f"{stage}/{name}", value) for name, value in numbers.items()]
        tagged += [(f"timing/{name}", value) for name, value in times.items()]
        summary = self._summary(value=[self._summary.Value(tag=tag, simple_value=value) for tag, value in tagged])
        try:
            self._lines.write(json.dumps(line, allow_nan=False).encode() + b"\n")
            self._lines.flush()
            self._events.write_event(self._event(step=int(step), wall_time=time.time(), summary=summary))
            if time.monotonic() - self._flushed > TENSORBOARD_FLUSH_SECONDS:
                self._events.flush()
                self._flushed = time.monotonic()
        except OSError as error:
            raise _unwritable(self.path, error) from error

    def flush(self) -> None:
        """Puts everything on the disk itself; call it with each checkpoint, so that a power cut spares both."""
        try:
            self._lines.flush()
            os.fsync(self._lines.fileno())
            self._events.flush()
        except OSError as error:
            raise _unwritable(self.path, error) from error
        self._flushed = time.monotonic()

    def close(self) -> None:
        """Flushes and closes; a second call does nothing."""
        if not self._lines.closed:
            self.flush()
            self._lines.close()
            self._events.close()

    def __enter__(self) -> MetricsWriter:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _spelled(values: dict[str, float]) -> dict[str, float | str]:
    return {name: value if math.isfinite(value) else str(value) for name, value in values.items()}


def _unwritable(path: Path, error: OSError) -> RunFolderError:
    return RunFolderError(
        f"{path}: {error.strerror or error}",
        "a run folder that can be written, with free disk space",
        "free space or permit writing, then start the same command again: it resumes from the last checkpoint",
    )


def _keep_until(path: Path, last_step: int) -> None:
    """Rewrites the file, atomically, with the lines whose step is at most `last_step`."""
    if not path.exists():
        return
    lines = path.read_bytes().split(b"\n")
    kept = []
    for number, line in enumerate(lines, start=1):
        if number == len(lines) and not line:
            break
        try:
            step = json.loads(line)["step"]
        except (ValueError, KeyError, TypeError):
            if number == len(lines):  # no newline after it: the process died in the middle of this line
                break
            raise RunFolderError(
                f"{path}, line {number}: {line[:60]!r}",
                'one JSON object a line with a "step"',
                "remove that line, or move the file away if its history is not needed",
            ) from None
        if step <= last_step:
            kept.append(line + b"\n")
    write_atomic(path, b"".join(kept))


# --------------------------------------------------------------------------------------------------
# Screen
# --------------------------------------------------------------------------------------------------


class Progress:
    """A progress bar a stage; where the output is no terminal, one plain line every `interval` seconds instead.

    Shows loss, tokens/s, MFU (model FLOP/s over the peak of all devices; without a known peak the FLOP/s reached)
    and the time left, which is measured from a stage's first update on, so that compilation does not count.

    Args:
        peak: FLOP/s of all devices together (`peak_flops(kind) * jax.device_count()`), or None if unknown.
        console: where to print; standard output by default.
        quiet: print nothing, as every process but the first.
        interval: seconds between plain lines.
        clock: seconds, monotonic; tests hand in their own.
    """

    def __init__(
        self,
        *,
        peak: float | None = None,
        console: Console | None = None,
        quiet: bool = False,
        interval: float = 10.0,
        clock: Callable[[], float] = time.monotonic,
    ):
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, TextColumn
        from rich.progress import Progress as Bars

        self._console = console or Console(quiet=quiet)
        self._peak, self._interval, self._clock = peak, interval, clock
        self._bars = None
        if self._console.is_terminal and not self._console.is_dumb_terminal:
            columns = [TextColumn("[bold]{task.description}"), BarColumn(bar_width=None), MofNCompleteColumn()]
            columns += [TextColumn(f"{{task.fields[{name}]}}") for name in ("loss", "tokens", "compute", "left")]
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
        """Begins a stage of `total` steps, `start` of which an earlier process has done."""
        self._name, self._total, self._start = name, total, start
        self._began, self._mark, self._printed = self._clock(), None, -math.inf
        self._fields = {"loss": "", "tokens": "", "compute": "", "left": ""}
        if self._bars:
            self._task = self._bars.add_task(_escaped(name), total=total, completed=start, **self._fields)

    def update(
        self,
        step: int,
        *,
        loss: float | None = None,
        tokens_per_second: float | None = None,
        flops_per_second: float | None = None,
    ) -> None:
        """Shows that `step` steps of the stage are done; a figure left out keeps its last value.

        Args:
            step: steps done in this stage, at most its total.
            loss: the latest loss.
            tokens_per_second: over all devices.
            flops_per_second: model FLOP/s over all devices, encoders included.
        """
        now = self._clock()
        if self._mark is None:
            self._mark = (step, now)
        fields = self._fields
        if loss is not None:
            fields["loss"] = f"loss {float(loss):.4f}"
        if tokens_per_second is not None:
            fields["tokens"] = f"{_metric(tokens_per_second)} tokens/s"
        if flops_per_second is not None:
            fields["compute"] = (
                f"MFU {flops_per_second / self._peak:.1%}" if self._peak else f"{_metric(flops_per_second, ' ')}FLOP/s"
            )
        done, at = self._mark
        if step >= self._total:
            fields["left"] = f"took {_duration(now - self._began)}"
        elif step > done:
            fields["left"] = f"ETA {_duration((self._total - step) * (now - at) / (step - done))}"
        if self._bars:
            self._bars.update(self._task, completed=step, **fields)
        elif step >= self._total or now - self._printed >= self._interval:
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
    """`12300` -> `"12.3k"`; `space` goes before the SI prefix, for units that join it, as in `"3.2 GFLOP/s"`."""
    for size, prefix in ((1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= size:
            return f"{value / size:.1f}{space}{prefix}"
    return f"{value:.0f}{space}"


def _duration(seconds: float) -> str:
    minutes, second = divmod(round(seconds), 60)
    hours, minute = divmod(minutes, 60)
    return f"{hours}:{minute:02d}:{second:02d}" if hours else f"{minute}:{second:02d}"


# --------------------------------------------------------------------------------------------------
# Speed
# --------------------------------------------------------------------------------------------------


class Meter:
    """Speed over the last steps; the first step, which compiles, is left out."""

    def __init__(self, flops: int, window: int = 50):
        self.flops, self.window = flops, window
        self.marks: list[tuple[float, int]] = []
        self.tokens_rate: float | None = None
        self.flops_rate: float | None = None

    def tick(self, tokens: int) -> None:
        self.marks = [*self.marks[-self.window :], (time.monotonic(), tokens)]
        if len(self.marks) > 1:
            seconds = self.marks[-1][0] - self.marks[0][0]
            self.tokens_rate = sum(tokens for _, tokens in self.marks[1:]) / seconds
            self.flops_rate = self.flops * (len(self.marks) - 1) / seconds

    def timing(self) -> dict[str, float]:
        if self.tokens_rate is None:
            return {}
        return {"tokens_per_second": self.tokens_rate, "flops_per_second": self.flops_rate}
