"""The files of measured lengths: blocks during measuring, then one table, which is mapped into memory."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from zipfile import BadZipFile

import numpy as np

from mllm_jax.errors import DataError
from mllm_jax.files import read_json, write_atomic

BLOCK = 1024  # examples that are measured and written together; a kill loses at most these
_TABLE, _FACTS, _BLOCKS = "table.npy", "facts.json", "blocks"


@dataclass(frozen=True)
class Block:
    """The measured lengths of some examples.

    Attributes:
        number: of their block.
        indices: int64[k], of the examples.
        table: int32[1 + M, k], the length of each (0 if it cannot be used) and its slots of each modality.
        bad: index and reason of examples that cannot be used.
        dropped_turns: of all these examples.
    """

    number: int
    indices: np.ndarray
    table: np.ndarray
    bad: tuple[tuple[int, str], ...] = ()
    dropped_turns: int = 0


class MeasuredFiles:
    """The measured lengths of one source, in a folder or in memory.

    Args:
        folder: None stores nothing.
        count: number of examples of the source.
        modalities: those whose slots are stored.

    Attributes:
        table: int32[1 + M, n], see `Block`; a memory map once all examples are measured.
        bad: index -> reason.
    """

    def __init__(self, folder: Path | None, count: int, modalities: Sequence[str]):
        self.folder, self.count, self.modalities = folder, count, tuple(modalities)
        self.read()

    def read(self) -> None:
        """Reads the table and newer blocks. What cannot be read is measured again."""
        self.table = np.zeros((1 + len(self.modalities), self.count), np.int32)
        self.bad: dict[int, str] = {}
        self.dropped: dict[int, int] = {}  # by block
        self.numbers = range(-(-self.count // BLOCK))
        if self.folder is not None:
            self._read_table()
            for file in sorted((self.folder / _BLOCKS).glob("*.npz")):
                self._read_block(file)

    @property
    def complete(self) -> bool:
        """True if every example was measured, also as bad."""
        return len(self.dropped) == len(self.numbers)

    @property
    def dropped_turns(self) -> int:
        return sum(self.dropped.values())

    def missing(self) -> list[tuple[int, np.ndarray]]:
        """Returns blocks and their examples to measure: new ones, and bad ones, which may have been corrected."""
        again: dict[int, list[int]] = {}
        for index in sorted(self.bad):
            again.setdefault(index // BLOCK, []).append(index)
        for number in self.numbers:
            if number not in self.dropped:
                again[number] = list(self.examples(number))
        return [(number, np.asarray(again[number], np.int64)) for number in sorted(again)]

    def examples(self, number: int) -> range:
        """Returns the examples of a block."""
        return range(number * BLOCK, min((number + 1) * BLOCK, self.count))

    def add(self, block: Block) -> None:
        """Stores the lengths of a block; they are on the disk when this returns."""
        before = {index: self.bad.pop(index) for index in block.indices.tolist() if index in self.bad}
        self.bad |= dict(block.bad)
        if block.number in self.dropped and before == dict(block.bad):  # measured again, with the same bad examples
            return
        self._writable()[:, block.indices] = block.table
        self.dropped[block.number] = self.dropped.get(block.number, 0) + block.dropped_turns
        if self.folder is not None:
            self._write_block(block.number)

    def merge(self) -> None:
        """Merges all blocks into one table, which is on the disk before any block is removed."""
        if self.folder is None or not self.complete or not (self.folder / _BLOCKS).is_dir():
            return
        dropped = [self.dropped[number] for number in self.numbers]
        facts = dict(modalities=self.modalities, dropped_turns=dropped, bad=sorted(self.bad.items()))
        write_atomic(self.folder / _TABLE, lambda file: np.save(file, self.table))
        write_atomic(self.folder / _FACTS, json.dumps(facts))
        shutil.rmtree(self.folder / _BLOCKS, ignore_errors=True)
        self.read()

    def _writable(self) -> np.ndarray:
        if not self.table.flags.writeable:
            self.table = np.array(self.table)
        return self.table

    def _read_table(self) -> None:
        try:
            facts = read_json(self.folder / _FACTS, DataError)
            table = np.load(self.folder / _TABLE, mmap_mode="r", allow_pickle=False).view(np.ndarray)
            bad = {int(index): str(reason) for index, reason in facts["bad"]}
            dropped = dict(zip(self.numbers, map(int, facts["dropped_turns"]), strict=True))
        except (OSError, ValueError, KeyError, TypeError, DataError):
            return
        if (table.shape, table.dtype) == (self.table.shape, self.table.dtype):
            self.table, self.bad, self.dropped = table, bad, dropped

    def _read_block(self, file: Path) -> None:
        try:
            number = int(file.stem)
            with np.load(file, allow_pickle=False) as stored:
                table, dropped, bad = stored["table"], int(stored["dropped_turns"]), json.loads(str(stored["bad"]))
            bad = {int(index): str(reason) for index, reason in bad}
        except (OSError, ValueError, KeyError, EOFError, BadZipFile):
            return
        examples = self.examples(number)
        if number in self.numbers and table.shape == (len(self.table), len(examples)):
            self._writable()[:, examples.start : examples.stop] = table
            self.dropped[number] = dropped
            self.bad = {index: reason for index, reason in self.bad.items() if index not in examples} | bad

    def _write_block(self, number: int) -> None:
        examples = self.examples(number)
        table = self.table[:, examples.start : examples.stop]
        bad = json.dumps([[index, self.bad[index]] for index in examples if index in self.bad])
        file = self.folder / _BLOCKS / f"{number:07d}.npz"
        file.parent.mkdir(parents=True, exist_ok=True)
        stored = dict(table=table, dropped_turns=self.dropped[number], bad=np.array(bad))
        write_atomic(file, lambda opened: np.savez(opened, **stored))
