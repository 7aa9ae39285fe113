"""Worker processes that measure: each gets a copy of the source's encoder and measures one block at a time.

They are new interpreters, not forks: a process that runs jax must not be forked. Unlike those of `multiprocessing`,
they do not run the main script again. A process that dies is replaced and its block measured again, record by record; a
record at which processes die is reported as bad.
"""

from __future__ import annotations

import contextlib
import os
import pickle
import queue
import subprocess
import sys
import threading
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, BinaryIO

import numpy as np

from mllm_jax.data.measured_files import Block
from mllm_jax.data.source_encoder import SourceEncoder
from mllm_jax.data.units import in_words
from mllm_jax.errors import DataError, ReadError

ATTEMPTS = 3  # at one block, before a record is reported
# A worker computes nothing on devices, and uses one core.
_ENVIRONMENT = {
    "JAX_PLATFORMS": "cpu", "TOKENIZERS_PARALLELISM": "false", "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1",
}  # fmt: skip
_START = "from mllm_jax.data.measuring_workers import serve; serve()"

Task = tuple[int, np.ndarray]  # the number of a block, and its examples to measure


class NoWorkers(Exception):
    """Worker processes cannot be started; the text is the reason."""


def measure_block(
    encoder: SourceEncoder, modalities: Sequence[str], task: Task, before: Callable[[int], object] | None = None
) -> Block:
    """Measures examples of one block.

    Args:
        before: called with each index before it is measured.
    """
    number, indices = task
    table = np.zeros((1 + len(modalities), len(indices)), np.int32)
    bad: list[tuple[int, str]] = []
    dropped = 0
    for column, index in enumerate(indices.tolist()):
        if before is not None:
            before(index)
        try:
            taken = encoder.measure(index)
            if unknown := {m: count for m, count in taken.slots.items() if count and m not in modalities}:
                raise too_many_slots(encoder, index, unknown, {})
        except DataError as error:
            bad.append((index, str(error)))
            continue
        table[:, column] = taken.length, *(taken.slots.get(modality, 0) for modality in modalities)
        dropped += taken.dropped_turns
    return Block(number, indices, table, tuple(bad), dropped)


def too_many_slots(
    encoder: SourceEncoder, index: int, needed: Mapping[str, int], slots: Mapping[str, int]
) -> DataError:
    """Returns the refusal of an example whose media take more slots than a row has."""
    unit = encoder.processor.layout.unit
    given = f"{encoder.name}[{index}]: {in_words(needed, unit)}"
    return DataError(given, f"at most {in_words(slots, unit)} a row", "raise the mixture's slots")


# ---- in the process that starts them


class Workers:
    """Some worker processes.

    Args:
        encoder: each process gets a copy.
        count: number of processes.

    Raises:
        NoWorkers: the encoder cannot be sent to another process.
    """

    def __init__(self, encoder: SourceEncoder, modalities: Sequence[str], count: int):
        try:
            self._sent = pickle.dumps((encoder, tuple(modalities)))
        except Exception as error:  # pickle raises what the objects do
            raise NoWorkers(f"{type(error).__name__}: {error}") from error
        self.name, self._height, self._count = encoder.name, 1 + len(modalities), count
        self._results: queue.SimpleQueue[Block | BaseException] = queue.SimpleQueue()
        self._closed = threading.Event()
        self._processes: set[subprocess.Popen] = set()

    def measure(self, tasks: Sequence[Task]) -> Iterator[Block]:
        """Yields the blocks in the order in which they are finished.

        Raises:
            NoWorkers: a process did not start.
            ReadError: processes die at different records, so no record is at fault.
            Exception: an error of measuring in a process.
        """
        waiting: queue.SimpleQueue[Task | None] = queue.SimpleQueue()
        count = min(self._count, len(tasks))
        for task in [*tasks, *[None] * count]:
            waiting.put(task)
        threads = [threading.Thread(target=self._attend, args=(waiting,), daemon=True) for _ in range(count)]
        for thread in threads:
            thread.start()
        try:
            for _ in tasks:
                result = self._results.get()
                if isinstance(result, BaseException):
                    raise result
                yield result
        finally:
            self._closed.set()
            for process in list(self._processes):
                process.kill()
            for thread in threads:
                thread.join()

    def _attend(self, waiting: queue.SimpleQueue[Task | None]) -> None:
        """Gives tasks to a process, and to its replacements; runs in a thread."""
        process = None
        try:
            while not self._closed.is_set() and (task := waiting.get()) is not None:
                block, process = self._insist(task, process)
                self._results.put(block)
        except BaseException as error:  # of the thread: raised in `measure`
            self._results.put(error)
        finally:
            if process is not None:
                self._end(process)

    def _insist(self, task: Task, process: subprocess.Popen | None) -> tuple[Block, subprocess.Popen]:
        """Measures a block, with new processes if one dies."""
        number, indices = task
        bad: list[tuple[int, str]] = []
        died: list[int | None] = []  # the examples at which processes died
        while True:
            process = self._started() if process is None else process
            answer, at = self._ask(process, (number, indices), careful=bool(died or bad))
            if isinstance(answer, Block):
                return _with_bad(answer, bad, self._height), process
            if isinstance(answer, BaseException):
                self._end(process)
                raise answer
            code = self._end(process)
            process = None
            if self._closed.is_set():
                raise NoWorkers("closed")
            died.append(at)
            if len(died) < ATTEMPTS:
                continue
            how = f"signal {-code}" if code < 0 else f"exit code {code}"
            if len(places := set(died[1:])) > 1 or None in places:
                raise ReadError(
                    f"{self.name}: {ATTEMPTS} processes that measured its records {indices[0]} to {indices[-1]} ended "
                    f"({how}), not all at the same record",
                    "processes that nothing ends, and enough memory for them",
                    "find out what ends them, then start the same command again: it measures the missing examples",
                )
            reason = DataError(
                f"{self.name}[{at}]: {ATTEMPTS} processes that measured it ended ({how})",
                "a record that can be read",
                "leave the record out, or replace its media",
            )
            bad.append((at, str(reason)))
            indices, died = indices[indices != at], []

    def _started(self) -> subprocess.Popen:
        """Starts a process and waits until it is ready."""
        path = os.pathsep.join(os.path.abspath(entry) for entry in sys.path)
        try:
            process = subprocess.Popen(
                [sys.executable, "-c", _START],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                env=os.environ | _ENVIRONMENT | {"PYTHONPATH": path},
                process_group=0,  # its parent answers an interrupt from the keyboard
            )
        except OSError as error:
            raise NoWorkers(str(error)) from error
        self._processes.add(process)
        if self._closed.is_set():
            process.kill()
        try:
            process.stdin.write(self._sent)
            process.stdin.flush()
            ready = pickle.load(process.stdout)
        except (OSError, EOFError, pickle.UnpicklingError):
            ready = None
        if isinstance(ready, BaseException) or ready is None:
            code = self._end(process)
            raise NoWorkers(f"a process ended with {code} as it started" if ready is None else str(ready)) from ready
        return process

    def _ask(self, process: subprocess.Popen, task: Task, careful: bool) -> tuple[Any, int | None]:
        """Returns a process's answer (None if it died) and, with `careful`, the example that it was at."""
        at = None
        try:
            pickle.dump((task, careful), process.stdin)
            process.stdin.flush()
            while isinstance(answer := pickle.load(process.stdout), int):
                at = answer
            return answer, at
        except (OSError, EOFError, pickle.UnpicklingError):
            return None, at

    def _end(self, process: subprocess.Popen) -> int:
        """Ends a process that measures nothing; returns its exit code."""
        for pipe in (process.stdin, process.stdout):
            with contextlib.suppress(OSError):  # unwritten data for a process that has ended
                pipe.close()
        code = process.wait()
        self._processes.discard(process)
        return code


def _with_bad(block: Block, bad: list[tuple[int, str]], height: int) -> Block:
    """Returns the block with examples that no process could measure."""
    if not bad:
        return block
    indices = np.append(block.indices, [index for index, _ in bad])
    table = np.concatenate([block.table, np.zeros((height, len(bad)), np.int32)], axis=1)
    return Block(block.number, indices, table, (*block.bad, *bad), block.dropped_turns)


# ---- in a process that measures


def serve() -> None:
    """Answers tasks on standard input until it ends; the library's own output goes to standard error."""
    answers, tasks = os.fdopen(os.dup(1), "wb"), sys.stdin.buffer
    os.dup2(2, 1)
    try:
        encoder, modalities = pickle.load(tasks)
    except Exception as error:
        _answer(answers, RuntimeError(f"{type(error).__name__}: {error}"))
        return
    _answer(answers, True)
    tell = partial(_answer, answers)
    while True:
        try:
            task, careful = pickle.load(tasks)
        except EOFError:
            return
        try:
            _answer(answers, measure_block(encoder, modalities, task, tell if careful else None))
        except BrokenPipeError:
            return
        except Exception as error:
            error.add_note("in a process that measures:\n" + traceback.format_exc())
            _answer(answers, error)


def _answer(answers: BinaryIO, answer: Any) -> None:
    try:
        content = pickle.dumps(answer)
    except Exception:  # an error with a value that cannot be sent
        content = pickle.dumps(RuntimeError("".join(traceback.format_exception(answer))))
    answers.write(content)
    answers.flush()
