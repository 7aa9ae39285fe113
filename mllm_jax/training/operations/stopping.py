"""Requests to stop: SIGTERM, SIGINT and a preemption notice, answered by all processes after the same step."""

from __future__ import annotations

import itertools
import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import jax

_calls = itertools.count(1)  # jax compares these numbers: equal on all processes, and unique in each


class Interrupted(Exception):
    """A signal asked the run to stop; a checkpoint was saved."""


class Stopping:
    """Requests to stop the run.

    A single process reads its own signals. With several processes, the SIGTERM of each (sent by clouds and schedulers
    before they take a machine away) goes through jax's preemption service, so that all stop after the same step.
    """

    def __init__(self):
        self.signalled = threading.Event()
        self._agreed = False

    @property
    def asked(self) -> bool:
        """True if the run must stop: as of the latest `after_step`, or as of now for a single process."""
        return self._agreed or (jax.process_count() == 1 and self.signalled.is_set())

    def after_step(self) -> bool:
        """Returns whether to stop after the step that was just dispatched; all processes call it once a step."""
        if jax.process_count() > 1:
            from jax.experimental.multihost_utils import reached_preemption_sync_point

            self._agreed |= reached_preemption_sync_point(next(_calls))
        return self.asked


@contextmanager
def signals() -> Iterator[Stopping]:
    """Yields the `Stopping` that SIGTERM and SIGINT set; a second SIGINT interrupts at once."""
    stopping = Stopping()
    if threading.current_thread() is not threading.main_thread():
        yield stopping
        return
    alone = jax.process_count() == 1

    def handle(number, frame):
        if number == signal.SIGINT and stopping.signalled.is_set():
            raise KeyboardInterrupt
        stopping.signalled.set()
        if not alone:  # to jax's own handler, which notifies the other processes
            os.kill(os.getpid(), signal.SIGTERM)

    # With several processes SIGTERM stays with jax's handler: a Python handler would replace it.
    caught = (signal.SIGTERM, signal.SIGINT) if alone else (signal.SIGINT,)
    previous = {number: signal.signal(number, handle) for number in caught}
    try:
        yield stopping
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def heed_no_notice() -> None:
    """Lets SIGTERM end the process: no step follows that would check for a notice."""
    if jax.process_count() > 1 and threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
