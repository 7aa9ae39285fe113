"""`--profile`: a trace of a few steps."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax

FIRST, STEPS = 2, 3  # number of steps that are skipped, since they compile, and number that are traced


class Profile:
    """Traces a few steps of the first stage that has them.

    Args:
        folder: for the trace; None: no trace.
        say: prints a message about how to open the trace.
    """

    def __init__(self, folder: Path | None, say: Callable[[str], None]):
        self.folder, self._say, self._start = folder, say, None

    def next_stage(self) -> None:
        """Begins a stage; if the stage before it was too short, this one is traced."""
        self._start = None

    def before(self, step: int) -> None:
        """Starts the trace if it is due; call it before each step is dispatched, with its number in the stage."""
        if self.folder is None:
            return
        if self._start is None:
            self._start = step + FIRST
        if step == self._start:
            jax.profiler.start_trace(str(self.folder), create_perfetto_trace=True)

    def after(self, step: int, results: Any, last: bool) -> None:
        """Ends the trace if it is due, after waiting for `results`; call it after each step was dispatched."""
        if self.folder is None or step < self._start:
            return
        if step == self._start + STEPS - 1 or last:
            jax.block_until_ready(results)
            jax.profiler.stop_trace()
            trace = max(self.folder.glob("plugins/profile/*/perfetto_trace.json.gz"), key=lambda p: p.stat().st_mtime)
            self._say(
                f"profile of steps {self._start} to {step}: open {trace} at https://ui.perfetto.dev, or run\n"
                f"  pip install xprof && xprof --logdir {self.folder}"
            )
            self.folder = None
