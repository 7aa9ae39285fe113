"""A .jsonl file of the answers to many prompts, which a later command can continue."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO

from mllm_jax.errors import DataError
from mllm_jax.files import open_regular, parse_json, read_json, write_atomic

ELSE = "name another --out, or remove this one"


class AnswersFile:
    """Answers, one a line, in the order of their prompts: {"id", "index", "text", "reason", "tokens"} and the image.

    `FILE.asked.json` beside it holds the prompts, the model and the options; the file itself holds only answers.
    Each line is written at once: an interruption leaves at most half of the last line, and the next start drops it.

    Args:
        asked: what the answers depend on, as JSON. A file of answers to anything else is refused.
        count: the number of prompts.

    Attributes:
        done: the numbers of the prompts that have an answer.

    Raises:
        DataError: the file holds answers to something else, or no answers.
        OSError: the file cannot be read or written.
    """

    def __init__(self, path: Path, asked: Mapping[str, Any], count: int):
        self.path, self._count = path, count
        self._header = path.with_name(f"{path.name}.asked.json")
        if path.suffix != ".jsonl" or not path.parent.is_dir():
            raise DataError(f"answers to {path}", "a name ending in .jsonl, in a folder that exists", "change --out")
        self._places: dict[int, int] = {}  # the offset of each line by its index, in the file's order
        if path.exists():
            self._check(asked)
            self._places = self._read()
        else:
            write_atomic(self._header, json.dumps(asked, indent=1, ensure_ascii=False) + "\n")
        self._file = path.open("ab")

    @property
    def done(self) -> set[int]:
        return set(self._places)

    def __enter__(self) -> AnswersFile:
        return self

    def __exit__(self, *_: object) -> None:
        """Closes the file; sorts it where answers came late, to prompts that had failed before."""
        self._file.close()
        if list(self._places) != sorted(self._places):
            write_atomic(self.path, self._write_in_order)

    def append(self, line: Mapping[str, Any]) -> None:
        """Adds the answer to prompt line["index"]."""
        place = self._file.tell()
        self._file.write(json.dumps(line, ensure_ascii=False).encode() + b"\n")
        self._file.flush()
        self._places[line["index"]] = place

    def _check(self, asked: Mapping[str, Any]) -> None:
        try:
            before = read_json(self._header, DataError)
        except FileNotFoundError as error:
            given = f"{self.path}, which exists, without {self._header.name} beside it"
            raise DataError(given, "a new file, or one that this command began", ELSE) from error
        now = json.loads(json.dumps(asked))
        if changed := sorted(name for name in before.keys() | now.keys() if before.get(name) != now.get(name)):
            raise DataError(
                f"{self.path}, which answers something else: other {', '.join(changed)}",
                f"what {self._header.name} says",
                f"give what it says, or {ELSE}",
            )

    def _read(self) -> dict[int, int]:
        places, begin = {}, 0
        with open_regular(self.path, DataError) as file:
            for number, line in enumerate(file, start=1):
                if not line.endswith(b"\n"):
                    break
                places[self._index(line, number, places)] = begin
                begin += len(line)
        with self.path.open("r+b") as file:
            file.truncate(begin)
        return places

    def _index(self, line: bytes, number: int, before: Mapping[int, int]) -> int:
        place = f"{self.path}, line {number}"
        index = parse_json(line, place, DataError, todo=ELSE).get("index")
        if type(index) is not int or not 0 <= index < self._count or index in before:
            expected = f"an index from 0 to {self._count - 1}, each once"
            raise DataError(f"{place}: index {index!r:.40}", expected, f"remove the line, or {ELSE}")
        return index

    def _write_in_order(self, out: BinaryIO) -> None:
        with self.path.open("rb") as file:
            for _, begin in sorted(self._places.items()):
                file.seek(begin)
                out.write(file.readline())
