"""The values of a run while it trains: metrics.jsonl and TensorBoard events."""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from mllm_jax.errors import RunFolderError, TrainingError
from mllm_jax.files import write_atomic

RESERVED = frozenset({"step", "stage", "timing"})
TENSORBOARD_FLUSH_SECONDS = 15.0


class Sink(Protocol):
    """Interface of a further receiver of a run's metrics, for `train(sinks=...)`. Only the first process calls it."""

    def begin(self, experiment: Any, folder: Path) -> None:
        """Begins: called once before the first step of a start, with the experiment and the run's folder."""

    def write(self, step: int, stage: str, values: Mapping[str, float], timing: Mapping[str, float]) -> None:
        """Receives each line, see `MetricsWriter.write`; a run that resumes repeats some lines."""

    def close(self, finished: bool) -> None:
        """Closes: called once at the end of a start, finished or not."""


class MetricsWriter:
    """metrics.jsonl and TensorBoard events of one run folder.

    A line is `{"step": int, "stage": str, <values>, "timing": {...}}` and reaches the operating system before `write`
    returns, so a killed process loses none. `timing` is separate because it alone differs between equal runs.
    One process of a run writes; `step` counts over all stages.

    Args:
        folder: the run folder; made if absent. Events go to `folder/tensorboard`.
        sinks: receive each line too, such as `Wandb`.
        resume_from: the step of the checkpoint that the run resumes from. Lines up to it stay. Later lines are removed,
            in TensorBoard too: the resumed run writes them again.

    Raises:
        RunFolderError: the folder cannot be written, or a line other than the last is not a metrics line.
    """

    def __init__(self, folder: Path, *, resume_from: int = 0, sinks: Sequence[Sink] = ()):
        from tensorboardX.event_file_writer import EventsWriter
        from tensorboardX.proto import event_pb2, summary_pb2

        self.path, self._sinks = Path(folder) / "metrics.jsonl", sinks
        self._event, self._summary = event_pb2.Event, summary_pb2.Summary
        try:
            events = Path(folder) / "tensorboard"
            events.mkdir(parents=True, exist_ok=True)
            _keep_until(self.path, resume_from)
            self._lines = self.path.open("ab")
            # tensorboardX names files by the second and truncates an existing one: a quick resume needs another name.
            # Its SummaryWriter is not used: it passes each value through a process queue that blocks for ever
            # after its thread has died of a full disk.
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
            values: metrics, scalars of any kind that `float` takes, kept exactly.
            timing: seconds, tokens/s and other figures that differ from machine to machine.

        Raises:
            TrainingError: a value has the name of a field of the line.
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
        # JSON has no NaN: a strict reader could not read the file with one.
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
        for sink in self._sinks:
            sink.write(int(step), stage, numbers, times)

    def flush(self) -> None:
        """Writes everything to the disk; call it with each checkpoint, so that both survive a power cut."""
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
            if number == len(lines):  # no newline after it: the process died while it wrote this line
                break
            raise RunFolderError(
                f"{path}, line {number}: {line[:60]!r}",
                'one JSON object a line with a "step"',
                "remove that line, or move the file away if its history is not needed",
            ) from None
        if step <= last_step:
            kept.append(line + b"\n")
    write_atomic(path, b"".join(kept))
