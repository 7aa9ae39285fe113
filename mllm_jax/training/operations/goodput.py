"""Goodput: the time of a run over all its starts, by use: training, compiling, waiting, saving, lost."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from mllm_jax.errors import RunFolderError
from mllm_jax.files import write_atomic

KINDS = {
    "productive": "steps that count",
    "compile": "first call of each compiled step",
    "input": "waiting for a batch while the devices had nothing to do",
    "checkpoint": "saving, as far as training waits for it",
    "lost": "steps done again after a restart",
    "down": "between the last sign of one start and the next start",
    "other": "starting, measuring data, restoring, validation and evaluation",
}
WRITE_SECONDS = 1.0  # between two writes of the file


class Goodput:
    """Seconds by kind, which add up to all the time since the run first started; kept in a file of the run folder.

    Time belongs to the innermost `spending` block; outside of all blocks, to "other". If a run resumes before a step
    that it had reached, the productive time after the resumed step becomes lost.

    Args:
        file: the JSON file with the seconds; None keeps them in memory (processes other than the first).
        clock, wall: seconds, monotonic and since the epoch; tests pass their own.

    Raises:
        RunFolderError: the file of an earlier start cannot be read.
    """

    def __init__(
        self, file: Path | None, clock: Callable[[], float] = time.monotonic, wall: Callable[[], float] = time.time
    ):
        self.file, self._clock, self._wall = file, clock, wall
        stored = _read(file) if file is not None and file.is_file() else {}
        self.seconds: dict[str, float] = dict.fromkeys(KINDS, 0.0) | stored.get("seconds", {})
        self.starts = stored.get("starts", 0) + 1
        self._step = stored.get("step", 0)
        self._marks: dict[str, float] = {"0": 0.0} | stored.get("marks", {})
        if stored and not stored.get("finished"):
            self.seconds["down"] += max(0.0, wall() - stored["wall"])
        self._kinds = ["other"]
        self._since, self._written = clock(), -float("inf")

    @contextmanager
    def spending(self, kind: str) -> Iterator[None]:
        """Counts the time of a block as `kind`, except the time of blocks inside it."""
        self._book()
        self._kinds.append(kind)
        try:
            yield
        finally:
            self._book()
            self._kinds.pop()

    def waited(self, batches: Iterator, busy: Callable[[], bool]) -> Iterator:
        """Yields the batches; a wait for one is input time, unless `busy()` after it: the devices still computed."""
        while True:
            self._book()
            try:
                batch = next(batches)
            except StopIteration:
                return
            self._book("productive" if busy() else "input")
            yield batch

    def resumed(self, step: int) -> None:
        """Records that a stage continues from `step` (over all stages), perhaps before the step reached earlier."""
        if self._step > step:
            known = max((int(mark) for mark in self._marks if int(mark) <= step), default=0)
            gone = max(0.0, self.seconds["productive"] - self._marks[str(known)])
            if known < step:  # the last mark is before the step: all steps between them count equally
                gone *= (self._step - step) / (self._step - known)
            self.seconds["productive"] -= gone
            self.seconds["lost"] += gone
        self._marks = {mark: value for mark, value in self._marks.items() if int(mark) <= step}
        self._step = step
        self.write()

    def reached(self, step: int, *, saved: bool = False) -> None:
        """Records that `step` steps are done, over all stages; `saved`: a run can resume here."""
        self._book()
        self._step = max(self._step, step)
        if saved:
            self._marks[str(step)] = self.seconds["productive"]
        if saved or self._clock() - self._written >= WRITE_SECONDS:
            self.write()

    def timing(self) -> dict[str, float]:
        """Returns the figures for a metrics line: seconds by kind, and the productive share."""
        self._book()
        total = sum(self.seconds.values())
        share = {"goodput": self.seconds["productive"] / total} if total else {}
        return share | {f"{kind}_seconds": value for kind, value in self.seconds.items()}

    def write(self, *, finished: bool = False) -> None:
        """Writes the file at once; `finished`: training is complete, so no time after this counts."""
        self._book()
        self._written = self._clock()
        if self.file is None:
            return
        account = {"seconds": self.seconds, "starts": self.starts, "step": self._step, "marks": self._marks}
        text = json.dumps(account | {"wall": self._wall(), "finished": finished})
        try:
            write_atomic(self.file, text)
        except OSError as error:
            raise RunFolderError(
                f"{self.file}: {error.strerror or error}",
                "a run folder that can be written, with room on its disk",
                "free space or permit writing, then start the same command again",
            ) from error

    def _book(self, kind: str | None = None) -> None:
        now = self._clock()
        self.seconds[kind or self._kinds[-1]] += now - self._since
        self._since = now


def _read(file: Path) -> dict[str, Any]:
    try:
        stored = json.loads(file.read_text())
        if not (stored["wall"] >= 0 and all(value >= 0 for value in stored["seconds"].values())):
            raise ValueError("negative times")
        return stored
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise RunFolderError(
            f"{file}: {type(error).__name__}: {error}",
            "the account that the run wrote there",
            "remove the file: only the account of time begins anew",
        ) from error
