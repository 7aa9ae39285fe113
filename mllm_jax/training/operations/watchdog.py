"""A watchdog for a run that may hang: it prints the stack of every thread and exits."""

from __future__ import annotations

import faulthandler
import os
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import jax

HANG_EXIT = 4


class Watchdog:
    """Ends the process, with exit code 4, if `beat` was not called for `seconds`.

    Prints the stack of every thread to standard error and writes it to a file. The other processes of the run then
    notice that this one is gone, and all can be started again. It watches only inside its `with` block.

    Args:
        folder: for the stacks; made when needed.
        seconds: at least the longest compilation and step together; 0: no watchdog.
        end: ends the process; tests pass their own.
    """

    def __init__(self, folder: Path, seconds: float, end: Callable[[int], object] = os._exit):
        self.folder, self.seconds, self._end = folder, seconds, end
        self._doing, self._at = "starting", time.monotonic()
        self._over = threading.Event()
        self._thread: threading.Thread | None = None

    def beat(self, doing: str) -> None:
        """Records a sign of life: the run begins `doing`, which is reported if no sign follows."""
        self._doing, self._at = doing, time.monotonic()

    def __enter__(self) -> Watchdog:
        if self.seconds > 0:
            self.beat("starting")
            self._over.clear()
            self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
            self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        if self._thread is not None:
            self._thread.join()

    def _watch(self) -> None:
        while not self._over.wait(min(5.0, self.seconds / 10)):
            silent = time.monotonic() - self._at
            if silent > self.seconds:
                self._report(silent)
                self._end(HANG_EXIT)
                return

    def _report(self, silent: float) -> None:
        text = (
            f"process {jax.process_index()} of {jax.process_count()}: no step finished for {silent:.0f} s, the last "
            f"sign of life: {self._doing}\n"
            f"  expected: a step, a checkpoint or a validation batch every {self.seconds:.0f} s\n"
            "  to do:    see the stacks for what it waits for; the same command continues from the last checkpoint; "
            "--hang-seconds sets this limit, 0: no watchdog\n"
        )
        print(text, file=sys.stderr, flush=True)
        try:
            # The descriptor itself: standard error may have been replaced by an object without one.
            faulthandler.dump_traceback(file=sys.__stderr__.fileno(), all_threads=True)
            self.folder.mkdir(parents=True, exist_ok=True)
            name = f"process-{jax.process_index()}-{time.strftime('%Y%m%d-%H%M%S')}.txt"
            with (self.folder / name).open("w") as file:
                file.write(text)
                file.flush()
                faulthandler.dump_traceback(file=file, all_threads=True)
        except OSError as error:
            print(f"the stacks could not be written: {error}", file=sys.stderr, flush=True)
