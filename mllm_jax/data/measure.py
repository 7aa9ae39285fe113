"""Measures the positions and slots of each example of a source: once, resumable, on all cores and hosts.

Lengths come from texts and from the sizes of images in the headers of their files. They are stored in a folder whose
name depends on all that they depend on: source, tokenizer, layout, image processor and template.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from mllm_jax.data.measured_files import BLOCK, Block, MeasuredFiles
from mllm_jax.data.measuring_workers import NoWorkers, Task, Workers, measure_block, too_many_slots
from mllm_jax.data.source_encoder import SourceEncoder
from mllm_jax.errors import ConfigError, DataError
from mllm_jax.sharding.cpu import cores
from mllm_jax.sharding.hosts import ALONE, Share, first_alone, together

SMALL = 8 * BLOCK  # one process measures fewer before others could start
SHOWN, WORTH = 5.0, 20.0  # CPU seconds of one process from which a bar is shown, and others are started
_ENOUGH = 1000  # bad examples more than allowed are enough to refuse a source


class Shows(Protocol):
    """A progress bar, such as `mllm_jax.training.operations.progress.Progress`."""

    def stage(self, name: str, total: int, start: int = 0) -> None: ...
    def update(self, step: int) -> None: ...
    def message(self, text: str) -> None: ...


@dataclass(frozen=True)
class MeasuredLengths:
    """Length, and media slots by modality, of every example of a source; unusable ones have length 0 and a reason."""

    lengths: np.ndarray
    slots: Mapping[str, np.ndarray]
    bad: tuple[tuple[int, str], ...] = ()
    dropped_turns: int = 0


@dataclass(frozen=True)
class HowToMeasure:
    """The resources of measuring; the lengths do not depend on them.

    Attributes:
        folder: of stored lengths; None stores nothing.
        workers: number of processes; None: one per core if that saves time, else only this one.
        hosts: each measures its share; they share `folder`.
        progress: the progress bar; None shows nothing.
    """

    folder: Path | None = None
    workers: int | None = None
    hosts: Share = ALONE
    progress: Shows | None = None


def measure(
    encoder: SourceEncoder,
    slots: Mapping[str, int],
    *,
    max_bad_share: float = 0.0,
    how: HowToMeasure = HowToMeasure(),
) -> MeasuredLengths:
    """Measures the examples of a source that were not measured before.

    Args:
        slots: of a row, by modality.
        max_bad_share: the largest share of examples that cannot be used.

    Raises:
        DataError: too many examples cannot be used; it names the first ones by source, index and reason.
        ReadError: the source cannot be read at the moment.
    """
    modalities, count = sorted(slots), len(encoder.source)
    folder = None if how.folder is None else how.folder / f"{encoder.key()}-{'-'.join(modalities)}"
    kept = MeasuredFiles(folder, count, modalities)
    allowed = max_bad_share * count

    def share() -> None:
        # by number: the others may have stored blocks before this process read which are missing
        tasks = [task for task in kept.missing() if task[0] % how.hosts.count == how.hosts.index]
        for block in _measured(encoder, modalities, tasks, how):
            kept.add(block)
            if len(kept.bad) > allowed + _ENOUGH:
                raise _unusable(encoder, sorted(kept.bad.items()), "at least ", max_bad_share)

    def read_all() -> None:
        kept.read()
        if not kept.complete:
            raise _not_shared(encoder, folder)

    if how.hosts.count > 1:
        together(share)
        together(read_all)  # merging removes the blocks: none may still be reading them
        first_alone(kept.merge)
        kept.read()
    else:
        share()
        kept.merge()
    return _checked(encoder, kept, slots, max_bad_share)


def _measured(
    encoder: SourceEncoder, modalities: Sequence[str], tasks: Sequence[Task], how: HowToMeasure
) -> Iterator[Block]:
    """Yields the blocks of tasks; by default the time of the first decides on a bar and other processes."""
    waiting, done = dict(tasks), 0
    total, needed = sum(map(len, waiting.values())), 0.0

    def here() -> Iterator[Block]:
        yield from (measure_block(encoder, modalities, task) for task in list(waiting.items()))

    def counted(blocks: Iterator[Block]) -> Iterator[Block]:
        nonlocal done
        for block in blocks:
            del waiting[block.number]
            done += len(block.indices)
            if progress is not None:
                progress.update(done)
            yield block

    progress, workers = None, how.workers
    if workers is None and waiting:
        started = time.thread_time()
        yield from counted(itertools.islice(here(), 1))
        needed = (time.thread_time() - started) / done * (total - done)
        workers = cores() if total > SMALL and needed > WORTH else 1
    if how.progress is not None and total > SMALL and (needed > SHOWN or how.workers is not None):
        progress = how.progress
        progress.stage(f"measure {encoder.name}", total, done)
    if waiting and workers > 1:
        try:
            yield from counted(Workers(encoder, modalities, workers).measure(list(waiting.items())))
        except NoWorkers as error:
            if how.progress is not None:
                how.progress.message(f"{encoder.name} is measured in one process: {error}")
    yield from counted(here())


def _checked(
    encoder: SourceEncoder, kept: MeasuredFiles, slots: Mapping[str, int], max_bad_share: float
) -> MeasuredLengths:
    """Returns the lengths, without examples that need more slots than a row has."""
    lengths, taken = kept.table[0], dict(zip(kept.modalities, kept.table[1:], strict=True))
    over = np.zeros(len(lengths), bool)
    for modality, column in taken.items():
        over |= column > slots[modality]
    wide = np.flatnonzero(over)
    most = int(max_bad_share * len(lengths)) + _ENOUGH
    bad = list(kept.bad.items())
    for index in wide[:most].tolist():
        needed = {modality: int(column[index]) for modality, column in taken.items() if column[index]}
        bad.append((index, str(too_many_slots(encoder, index, needed, slots))))
    if len(bad) > max_bad_share * len(lengths):
        raise _unusable(encoder, sorted(bad), "at least " if len(wide) > most else "", max_bad_share)
    if len(wide):
        lengths = np.where(over, 0, lengths)
    return MeasuredLengths(lengths, taken, tuple(sorted(bad)), kept.dropped_turns)


def _not_shared(encoder: SourceEncoder, folder: Path | None) -> ConfigError:
    return ConfigError(
        f"{encoder.name}: lengths in {folder}, which lacks those that the other processes measured",
        "one folder that all processes of the run can read",
        "name a run folder on a disk that they share",
    )


def _unusable(encoder: SourceEncoder, bad: Sequence[tuple[int, Any]], about: str, max_bad_share: float) -> DataError:
    first = "\n".join(reason for _, reason in bad[:5])
    return DataError(
        f"{encoder.name}: {about}{len(bad)} of {len(encoder.source)} examples cannot be used, the first:\n{first}",
        f"at most {max_bad_share:.2%}",
        "correct the records, or raise the mixture's max_bad_share",
    )
