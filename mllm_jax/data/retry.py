"""Retries reads that fail temporarily, with growing pauses, and stops clearly if they keep failing."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

from mllm_jax.errors import ConfigError, ReadError

T = TypeVar("T")
# Errors that waiting does not change.
_LASTING = (FileNotFoundError, PermissionError, IsADirectoryError, NotADirectoryError)


@dataclass(frozen=True)
class RetryPolicy:
    """Retry policy of failing reads: pauses of `first_pause` seconds, each `factor` times the previous one.

    Attributes:
        attempts: total number of reads.
        slow_seconds: a read that takes longer is reported with its source and index.
    """

    attempts: int = 6
    first_pause: float = 1.0
    factor: float = 2.0
    slow_seconds: float = 30.0

    def __post_init__(self):
        if self.attempts < 1 or self.first_pause < 0 or self.factor < 1:
            raise ConfigError(f"{self}", "one attempt or more, and pauses that do not shrink", "change it")


def patiently(read: Callable[[], T], what: str, patience: RetryPolicy = RetryPolicy()) -> T:
    """Returns the result of `read`, after at most `patience.attempts` attempts if disk or network fail.

    Such a failure is an OSError, or an error caused by one, unless it reports that the file is absent or forbidden.
    Every new attempt is reported as a warning.

    Args:
        what: the source and index, for messages.

    Raises:
        ReadError: the last attempt failed; other errors of `read` are raised unchanged.
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
            reason = f"{type(cause).__name__}: {cause}"
            if attempt == patience.attempts:
                raise ReadError(
                    f"{what}: {attempt} attempts to read it failed, the last with {reason}",
                    "a disk, bucket or network that answers",
                    "check the source's disk or network, then start the same command again: "
                    "it continues from the last checkpoint",
                ) from error
            warnings.warn(f"{what}: {reason}; attempt {attempt + 1} in {pause:g} s", stacklevel=2)
            time.sleep(pause)
            pause *= patience.factor
        else:
            if (taken := time.monotonic() - started) > patience.slow_seconds:
                warnings.warn(f"{what}: reading it took {taken:.0f} s", stacklevel=2)
            return value
    raise AssertionError("attempts are at least one")


def passing_cause(error: BaseException | None) -> OSError | None:
    """Returns the OSError that an error is or comes from, if it may be temporary; else None."""
    while error is not None:
        if isinstance(error, OSError):
            # An OSError without a number is not the system's: Pillow raises it for a damaged image.
            damaged = type(error) is OSError and error.errno is None
            return None if isinstance(error, _LASTING) or damaged else error
        error = error.__cause__
    return None
