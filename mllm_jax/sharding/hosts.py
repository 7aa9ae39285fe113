"""Several processes as one run: values from the first process, and arrays on more than one host."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np

import mllm_jax.errors
from mllm_jax.errors import MllmError

BLOCK = 1024  # bytes


@dataclass(frozen=True)
class Share:
    """The index of this process and the number of processes that share the work."""

    index: int = 0
    count: int = 1

    @classmethod
    def of_run(cls) -> Share:
        """Returns this process among all processes of jax."""
        return cls(jax.process_index(), jax.process_count())


ALONE = Share()


def is_first() -> bool:
    """Returns whether this process writes the run's files, metrics and console output."""
    return jax.process_index() == 0


def from_first(value: Any) -> Any:
    """Returns the first process's value on every process; all must call it at the same point.

    Args:
        value: a JSON value; only that of the first process is used.
    """
    if jax.process_count() == 1:
        return value
    from jax.experimental.multihost_utils import broadcast_one_to_all

    text = np.frombuffer(json.dumps(value).encode(), np.uint8) if is_first() else np.zeros(0, np.uint8)
    size = int(broadcast_one_to_all(np.int32(len(text))))
    padded = np.full(-(-size // BLOCK) * BLOCK, ord(" "), np.uint8)  # few sizes: each needs a compilation
    padded[: len(text)] = text
    return json.loads(bytes(np.asarray(broadcast_one_to_all(padded))))


def gather(value: Any) -> list[Any]:
    """Returns the values of all processes, in their order; all must call it at the same point.

    Args:
        value: JSON.
    """
    if jax.process_count() == 1:
        return [value]
    from jax.experimental.multihost_utils import process_allgather

    text = np.frombuffer(json.dumps(value).encode(), np.uint8)
    longest = int(np.max(process_allgather(np.int32(len(text)))))
    padded = np.full(-(-longest // BLOCK) * BLOCK, ord(" "), np.uint8)
    padded[: len(text)] = text
    return [json.loads(bytes(each)) for each in np.asarray(process_allgather(padded))]


def together(work: Callable[[], None]) -> None:
    """Runs `work` on every process, and waits for all; a refusal of one of them is raised on all."""
    if jax.process_count() == 1:
        work()
        return
    refusal: MllmError | None = None
    try:
        work()
    except MllmError as error:
        refusal = error
    refusals = gather(None if refusal is None else [type(refusal).__name__, *refusal.args])
    if refusal is not None:
        raise refusal
    for failure in filter(None, refusals):
        raise _refusal(failure)


def first_alone(work: Callable[[], None]) -> None:
    """Runs `work` on the first process while the others wait; its MllmError is raised on all of them."""
    if jax.process_count() == 1:
        work()
        return
    refusal: MllmError | None = None
    if is_first():
        try:
            work()
        except MllmError as error:
            refusal = error
    failure = from_first([type(refusal).__name__, *refusal.args] if refusal is not None else None)
    if refusal is not None:
        raise refusal
    if failure is not None:
        raise _refusal(failure)


def _refusal(failure: list[str]) -> MllmError:
    """Builds the exception that another process raised."""
    kind, *parts = failure
    return getattr(mllm_jax.errors, kind, MllmError)(*parts)


def fetch(array: jax.Array | np.ndarray) -> np.ndarray:
    """Returns the whole array on this host; all hosts must call this for an array that is on several hosts."""
    if isinstance(array, jax.Array) and not (array.is_fully_addressable or array.is_fully_replicated):
        from jax.experimental.multihost_utils import process_allgather

        array = process_allgather(array, tiled=True)
    return np.asarray(array)
