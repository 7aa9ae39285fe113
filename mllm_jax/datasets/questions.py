"""Questions of one's own: a .json list, or a .jsonl file, of records beside a folder of images.

    {"id": "7", "image": "a.png", "question": "What is this?", "answer": ["a cat", "cat"]}
    {"images": ["a.png", "b.png"], "question": "Which is older?", "choices": ["the first", "the second"], "answer": "B"}

`answer` is a text, or a list of texts of which each is right; with `choices` it is the letter, the number (from 0) or
the text of the right one. `image` (one name) or `images` (several) may be absent; names are relative to the folder and
stay inside it. `id` (or `question_id`) may be absent too; what else a record holds is not read.
"""

from __future__ import annotations

import functools
import hashlib
import os
import string
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mllm_jax.data.message import Image, Part
from mllm_jax.datasets.records import encodable, inside, names_a_file, short
from mllm_jax.errors import ConfigError, DataError
from mllm_jax.files import parse_json, read_bytes

MAX_BYTES = 1 << 30
LETTERS = string.ascii_uppercase  # of the choices, in their order
MEND = "mend the record, or leave it out"


@dataclass(frozen=True)
class Question:
    """A question with its right answers.

    Attributes:
        answers: each is right; of choices the letter and then the text of the right one.
        choices: the texts to choose from; none: the answer is free.
        media: what is asked about, read when it is needed.
    """

    question: str
    answers: tuple[str, ...]
    choices: tuple[str, ...] = ()
    media: tuple[Part, ...] = ()
    id: str = ""


@dataclass(frozen=True)
class Questions:
    """The questions of a file.

    Attributes:
        path: of the file, .json or .jsonl.
        media_folder: what the names of images are relative to; None: no question has an image.
    """

    path: str
    media_folder: str | None = None

    def __post_init__(self):
        # As text, so that a config that holds it can be written.
        for name in ("path", "media_folder"):
            if getattr(self, name) is not None:
                object.__setattr__(self, name, os.fspath(getattr(self, name)))
        if Path(self.path).suffix not in (".json", ".jsonl"):
            raise ConfigError(f"questions in {self.path}", "a .json or a .jsonl file", "name or rename the file")

    @property
    def name(self) -> str:
        return Path(self.path).name

    def fingerprint(self) -> str:
        """Changes with the file's bytes; of the images it knows their names."""
        return self._file[1]

    def __len__(self) -> int:
        return len(self._file[0])

    def example(self, index: int) -> Question:
        """A question with its images, which are read later. Raises DataError, which names the record: it is bad."""
        where, record = self._file[0][index]
        return _Record(where, record).question(None if self.media_folder is None else Path(self.media_folder))

    @property
    def _file(self) -> tuple[list[tuple[str, Any]], str]:
        """(where each record is, and the record), and a digest of the file."""
        path = Path(self.path)
        try:
            facts = path.stat()
            return _read(path, facts.st_size, facts.st_mtime_ns)
        except (OSError, ValueError) as error:  # ValueError: a name with a NUL byte
            raise DataError(
                f"the questions {path} cannot be read ({error})", "a file of questions", "correct the path"
            ) from error


@functools.lru_cache(maxsize=4)
def _read(path: Path, size: int, changed: int) -> tuple[list[tuple[str, Any]], str]:
    """Size and time of change make a file that was replaced be read again."""
    content = read_bytes(path, MAX_BYTES, DataError)
    if path.suffix == ".json":
        listed = parse_json(content, str(path), DataError, list, todo="mend the file: a JSON list of records")
        records = [(f"{path}, record {index}", record) for index, record in enumerate(listed)]
    else:
        lines = [(f"{path}, line {number}", line) for number, line in enumerate(content.split(b"\n"), start=1)]
        records = [(at, parse_json(line, at, DataError, object, todo=MEND)) for at, line in lines if line.strip()]
    if not records:
        raise DataError(f"{path} without a record", "at least one question", "name another file")
    return records, hashlib.sha256(content).hexdigest()[:16]


@dataclass(frozen=True)
class _Record:
    """A record, and where it is."""

    where: str
    record: Any

    def question(self, folder: Path | None) -> Question:
        if not isinstance(self.record, dict):
            self.refuse(f"a {type(self.record).__name__}", 'an object such as {"question": "...", "answer": "..."}')
        asked, choices = self.text("question", self.record.get("question")), self.choices()
        answers = self.chosen(choices) if choices else self.answers()
        media = tuple(Image(self.file(name, folder)) for name in self.images())
        return Question(asked, answers, choices, media, self.id())

    def refuse(self, given: str, expected: str, todo: str = MEND):
        raise DataError(f"{self.where}: {given}", expected, todo)

    def text(self, name: str, value: Any) -> str:
        if not isinstance(value, str) or not value.strip() or not encodable(value):
            self.refuse(f"{name} {short(value)}", "text that is not empty and that UTF-8 can write")
        return value

    def id(self) -> str:
        found = self.record.get("id", self.record.get("question_id", ""))
        if isinstance(found, bool) or not isinstance(found, str | int) or not encodable(str(found)):
            self.refuse(f"id {short(found)}", "a text or a whole number")
        return str(found)

    def answers(self) -> tuple[str, ...]:
        given = self.record.get("answer")
        given = given if isinstance(given, list) else [given]
        if not given:
            self.refuse("answer []", "a text, or a list of texts of which each is right")
        return tuple(self.text("answer", each) for each in given)

    def choices(self) -> tuple[str, ...]:
        given = self.record.get("choices")
        if given is None:
            return ()
        if not isinstance(given, list) or not 2 <= len(given) <= len(LETTERS):
            self.refuse(f"choices {short(given)}", f"a list of 2 to {len(LETTERS)} texts")
        choices = tuple(self.text("choice", each) for each in given)
        if len(set(choices)) < len(choices):
            self.refuse(f"choices {short(given)}", "texts that differ")
        return choices

    def chosen(self, choices: tuple[str, ...]) -> tuple[str, str]:
        """The letter and the text of the right choice."""
        given, letters = self.record.get("answer"), LETTERS[: len(choices)]
        if isinstance(given, str):
            found = {i for i, choice in enumerate(choices) if given.strip() in (choice.strip(), letters[i])}
        else:
            whole = isinstance(given, int) and not isinstance(given, bool)
            found = {given} if whole and 0 <= given < len(choices) else set()
        if len(found) != 1:
            expected = f"one of {letters[0]} to {letters[-1]}, of 0 to {len(choices) - 1}, or of the texts"
            what = "which is the letter of one choice and the text of another" if found else "which is no choice"
            self.refuse(f"answer {short(given)}, {what}", expected)
        (right,) = found
        return letters[right], choices[right]

    def images(self) -> list[str]:
        one, several = self.record.get("image"), self.record.get("images")
        if one is not None and several is not None:
            self.refuse("`image` and `images`", "one of the two")
        names = [one] if one is not None else [] if several is None else several
        if not isinstance(names, list) or not all(isinstance(name, str) and name for name in names):
            self.refuse(f"image {short(names if one is None else one)}", "`image` a name, or `images` a list of names")
        return names

    def file(self, name: str, folder: Path | None) -> Path:
        if folder is None:
            self.refuse(
                f"the image {short(name)}, without a folder", "the folder of the images", "give it: --media DIR"
            )
        path = inside(folder, name) if names_a_file(name) else None
        if path is None:
            self.refuse(f"the image {short(name)}", f"a file inside {folder}")
        if not path.is_file():
            self.refuse(f"no file {path}", "the image that the record names", "put it there, or correct the name")
        return path
