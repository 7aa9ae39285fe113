"""The monitors of a run while it trains: goodput, requests to stop, the watchdog and the profile."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from mllm_jax.checkpoints.run import RunFolder
from mllm_jax.sharding.hosts import is_first
from mllm_jax.training.operations.goodput import Goodput
from mllm_jax.training.operations.profiling import Profile
from mllm_jax.training.operations.progress import Progress
from mllm_jax.training.operations.stopping import Stopping, signals
from mllm_jax.training.operations.watchdog import Watchdog


@dataclass(frozen=True)
class Monitors:
    """The monitors of one run, from its first stage to its last."""

    goodput: Goodput
    stopping: Stopping
    watchdog: Watchdog
    profile: Profile


@contextmanager
def attended(folder: RunFolder, progress: Progress, hang_seconds: float, profile: bool) -> Iterator[Monitors]:
    """Makes the monitors of a run; every process has its own, and the first one prints and writes."""
    with signals() as stopping:
        yield Monitors(
            Goodput(folder.goodput if is_first() else None),
            stopping,
            Watchdog(folder.hangs, hang_seconds),
            Profile(folder.profile if profile and is_first() else None, progress.message),
        )
