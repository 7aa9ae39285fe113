"""Requests to stop: SIGTERM, SIGINT and a preemption notice, answered by all processes after the same step."""

from __future__ import annotations

import itertools
import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import jax

_calls = itertools.count(1)  # equal on all processes, and over all runs of this one: what jax compares


class Interrupted(Exception):
    """A signal asked the run to stop; a checkpoint was saved."""


class Stopping:
    """Whether the run was asked to stop.

    One process looks at its own signals. Of several, each one's SIGTERM (what clouds and schedulers send before they
    take a machine away) goes through jax's preemption service, which lets all of them stop after the same step.
    """

    def __init__(self):
        self.signalled = threading.Event()
        self._agreed = False

    @property
    def asked(self) -> bool:
        """Whether the run is to stop: so far as the latest `after_step` knew, or one process alone knows by now."""
        return self._agreed or (jax.process_count() == 1 and self.signalled.is_set())

    def after_step(self) -> bool:
        """Whether to stop after the step that was just started; all processes call it once a step."""
        if jax.process_count() > 1:
            from jax.experimental.multihost_utils import reached_preemption_sync_point

            self._agreed |= reached_preemption_sync_point(next(_calls))
        return self.asked


@contextmanager
def signals() -> Iterator[Stopping]:
    """What SIGTERM and SIGINT set; a second SIGINT interrupts at once."""
    stopping = Stopping()
    if threading.current_thread() is not threading.main_thread():
        yield stopping
        return
    alone = jax.process_count() == 1

    def handle(number, frame):
        if number == signal.SIGINT and stopping.signalled.is_set():
            raise KeyboardInterrupt
        stopping.signalled.set()
        if not alone:  # to jax's own handler, which tells the other processes
            os.kill(os.getpid(), signal.SIGTERM)

    # Among several processes SIGTERM stays with jax's handler: one of Python's would replace it.
    caught = (signal.SIGTERM, signal.SIGINT) if alone else (signal.SIGINT,)
    previous = {number: signal.signal(number, handle) for number in caught}
    try:
        yield stopping
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def heed_no_notice() -> None:
    """SIGTERM ends the process from now on: after the last step nobody asks jax for notices any more."""
    if jax.process_count() > 1 and threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
