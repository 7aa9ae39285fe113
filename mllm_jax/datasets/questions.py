"""Questions from the user's own file: a JSON list of records, or JSON lines.

    {"question": "What is this?", "image": "a.png", "answer": ["a cat", "cat"]}
    {"question": "What is this?", "images": ["a.png", "b.png"], "choices": ["a cat", "a dog"], "answer": "B", "id": "7"}

With choices, the answer is a letter, an index from 0 or the choice's text. The id may also be called `question_id`.
Other fields are ignored.
"""

from __future__ import annotations

import functools
import os
from dataclasses import dataclass
from pathlib import Path
from string import ascii_uppercase
from typing import Any, NoReturn

from mllm_jax.data.message import Image
from mllm_jax.datasets.record_checks import encodable, inside, may_name_file, short
from mllm_jax.errors import DataError
from mllm_jax.files import JSON_BYTES, parse_json, read_bytes

MEND = "correct the record, or leave it out"


@dataclass(frozen=True)
class Question:
    """One question and its right answers; the report shows the first.

    Attributes:
        images: in the question's order.
        choices: the texts to choose from, if any.
        id: names the question in predictions; "": its number does.
    """

    question: str
    answers: tuple[str, ...]
    images: tuple[Image, ...] = ()
    choices: tuple[str, ...] = ()
    id: str = ""


@dataclass(frozen=True)
class Questions:
    """A file of questions.

    Attributes:
        path: the file, .json or .jsonl.
        media_folder: folder of the records' image names; None: the file's own folder.
    """

    path: str
    media_folder: str | None = None

    def __post_init__(self):
        object.__setattr__(self, "path", os.fspath(self.path))
        if self.media_folder is not None:
            object.__setattr__(self, "media_folder", os.fspath(self.media_folder))

    def __len__(self) -> int:
        return len(self.build())

    def example(self, index: int) -> Question:
        return self.build()[index]

    def build(self) -> tuple[Question, ...]:
        """Reads the file, again only if it changes; checks only that images exist.

        Raises:
            DataError: the file cannot be read or has no questions, or a record is not a question.
        """
        path = Path(self.path)
        folder = path.parent if self.media_folder is None else Path(self.media_folder)
        try:
            facts = path.stat()
        except (OSError, ValueError) as error:  # ValueError: a NUL byte in the name
            raise _unreadable(path, error) from error
        return _questions(path, folder, facts.st_size, facts.st_mtime_ns)


@functools.lru_cache(maxsize=4)
def _questions(path: Path, folder: Path, size: int, changed: int) -> tuple[Question, ...]:
    """Reads the questions; `size` and `changed` make the cache read a changed file again."""
    return tuple(_Record(place, record, folder).read() for place, record in _records(path))


def option(index: int, choice: str) -> str:
    """Returns a choice as it is offered: its letter and its text."""
    return f"{ascii_uppercase[index]}. {choice}"


def _records(path: Path) -> list[tuple[str, Any]]:
    """Returns each record of a file with its location, for messages."""
    todo = "correct the file"
    if path.suffix not in (".json", ".jsonl"):
        raise DataError(f"the questions {path}", "a file .json or .jsonl", "rename or convert it")
    try:
        content = read_bytes(path, JSON_BYTES, DataError)
    except OSError as error:
        raise _unreadable(path, error) from error
    if path.suffix == ".json":
        records = enumerate(parse_json(content, str(path), DataError, list, todo=todo))
        found = [(f"{path}, index {index}", record) for index, record in records]
    else:
        lines = [(f"{path}, line {n}", line) for n, line in enumerate(content.split(b"\n"), start=1) if line.strip()]
        found = [(place, parse_json(line, place, DataError, object, todo=todo)) for place, line in lines]
    if not found:
        raise DataError(f"the questions {path}: none", "at least one record", "add questions")
    return found


def _unreadable(path: Path, error: Exception) -> DataError:
    reason = getattr(error, "strerror", None) or error
    return DataError(
        f"the questions {path} cannot be read ({reason})", "a file that exists and may be read", "correct the path"
    )


@dataclass(frozen=True)
class _Record:
    place: str
    record: Any
    folder: Path

    def read(self) -> Question:
        if not isinstance(self.record, dict):
            self._refuse(short(self.record), 'an object such as {"question": "...", "answer": "..."}')
        question = self._text(self.record.get("question"), "question")
        images = tuple(Image(self._file(name)) for name in self._names())
        choices = self._choices()
        answers = self._chosen(choices) if choices else self._answers()
        return Question(question, answers, images, choices, self._id())

    def _refuse(self, given: str, expected: str, todo: str = MEND) -> NoReturn:
        raise DataError(f"{self.place}: {given}", expected, todo)

    def _text(self, value: Any, name: str) -> str:
        if not isinstance(value, str) or not value.strip() or not encodable(value):
            self._refuse(f"{name} {short(value)}" if name in self.record else f"no {name}", f"{name} as a text")
        return value.strip()

    def _names(self) -> list[str]:
        one, several = self.record.get("image"), self.record.get("images")
        if one is not None and several is not None:
            self._refuse("image and images", "either of them")
        names = several if several is not None else [] if one is None else [one]
        if not isinstance(names, list) or not all(map(may_name_file, names)):
            self._refuse(f"image(s) {short(names)}", "image: a name, or images: a list of names")
        return names

    def _file(self, name: str) -> str:
        path = inside(name)
        if path is None:
            self._refuse(f"the image {short(name)}", f"a file inside {self.folder}")
        file = self.folder / path
        try:
            found = file.is_file()
        except OSError:  # a name that is too long
            found = False
        if not found:
            self._refuse(f"no image {file}", "a file", "correct the name, or the folder of media")
        return str(file)

    def _choices(self) -> tuple[str, ...]:
        choices = self.record.get("choices")
        if choices is None:
            return ()
        if not isinstance(choices, list) or not 2 <= len(choices) <= len(ascii_uppercase):
            self._refuse(f"choices {short(choices)}", f"a list of 2 to {len(ascii_uppercase)} texts")
        found = tuple(self._text(choice, "choices") for choice in choices)
        if len(set(map(_plain, found))) < len(found):
            self._refuse(f"choices {short(choices)}", "texts that differ")
        return found

    def _chosen(self, choices: tuple[str, ...]) -> tuple[str, ...]:
        """Returns the texts that name the right choice: its letter, its text, or both."""
        answer, letters = self.record.get("answer"), ascii_uppercase[: len(choices)]
        meant: set[int] = set()
        if isinstance(answer, int) and not isinstance(answer, bool):
            meant = {answer} & set(range(len(choices)))
        elif isinstance(answer, str):
            said = _plain(answer)
            meant = {i for i in range(len(choices)) if said in (letters[i].lower(), _plain(choices[i]))}
        if len(meant) != 1:
            given = f"answer {short(answer)}" if "answer" in self.record else "no answer"
            named = " or ".join(option(index, choices[index]) for index in sorted(meant))
            self._refuse(
                f"{given}, which is {named}" if meant else f"{given} to {len(choices)} choices",
                f"a letter A to {letters[-1]}, an index 0 to {len(choices) - 1}, or one choice's text",
                "write the index" if meant else MEND,
            )
        (index,) = meant
        letter, text = letters[index], choices[index]
        forms = (option(index, text), letter, f"({letter})", f"{letter})", f"({letter}) {text}", f"{letter}) {text}")
        # A text that is itself a letter would be another choice's name.
        return (*forms, f"{letter}: {text}", *(() if text.upper() in letters else (text,)))

    def _answers(self) -> tuple[str, ...]:
        answer = self.record.get("answer")
        given = answer if isinstance(answer, list) and answer else [answer]
        return tuple(self._text(one, "answer") for one in given)

    def _id(self) -> str:
        found = self.record.get("id", self.record.get("question_id", ""))
        if isinstance(found, bool) or not isinstance(found, str | int) or not encodable(str(found)):
            self._refuse(f"id {short(found)}", "a text or a number")
        return str(found)


def _plain(text: str) -> str:
    return " ".join(text.casefold().split())
