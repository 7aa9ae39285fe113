"""Reads that fail for a moment: tried again with growing pauses, and a clear stop where they go on failing."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

from mllm_jax.errors import ConfigError, ReadError

T = TypeVar("T")
# What waiting does not change.
_LASTING = (FileNotFoundError, PermissionError, IsADirectoryError, NotADirectoryError)


@dataclass(frozen=True)
class Patience:
    """How long a failing read is tried: pauses of `first_pause` seconds, each `factor` times the one before it.

    Attributes:
        attempts: reads in all.
        slow_seconds: a read that takes longer is told, by its source and index.
    """

    attempts: int = 6
    first_pause: float = 1.0
    factor: float = 2.0
    slow_seconds: float = 30.0

    def __post_init__(self):
        if self.attempts < 1 or self.first_pause < 0 or self.factor < 1:
            raise ConfigError(f"{self}", "one attempt or more, and pauses that do not shrink", "change it")


def patiently(read: Callable[[], T], what: str, patience: Patience = Patience()) -> T:
    """What `read` returns, at the latest after `patience.attempts` failures of disk or network.

    Such a failure is an OSError, or an error that one has caused, unless it says that the file is absent or forbidden.
    Every new attempt is told as a warning.

    Args:
        what: the source and index that are read, for the messages.

    Raises:
        ReadError: it failed to the last; any other error of `read` as it is.
    """
    pause = patience.first_pause
    for attempt in range(1, patience.attempts + 1):
        started = time.monotonic()
        try:
            value = read()
        except Exception as error:
            cause = passing_cause(error)
            if cause is None:
                raise
            told = f"{type(cause).__name__}: {cause}"
            if attempt == patience.attempts:
                raise ReadError(
                    f"{what}: {attempt} attempts to read it failed, the last with {told}",
                    "a disk, bucket or network that answers",
                    "see to where the source lies, then start the same command again: "
                    "it goes on from the last checkpoint",
                ) from error
            warnings.warn(f"{what}: {told}; attempt {attempt + 1} in {pause:g} s", stacklevel=2)
            time.sleep(pause)
            pause *= patience.factor
        else:
            if (taken := time.monotonic() - started) > patience.slow_seconds:
                warnings.warn(f"{what}: reading it took {taken:.0f} s", stacklevel=2)
            return value
    raise AssertionError("attempts are at least one")


def passing_cause(error: BaseException | None) -> OSError | None:
    """The OSError that an error is or comes from, if it may pass with time."""
    while error is not None:
        if isinstance(error, OSError):
            # A plain one without a number is not the system's: Pillow says so of an image that is damaged.
            damaged = type(error) is OSError and error.errno is None
            return None if isinstance(error, _LASTING) or damaged else error
        error = error.__cause__
    return None
