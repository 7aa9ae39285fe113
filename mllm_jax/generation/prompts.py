"""Many prompts: a file of conversations, one a line, or a folder of images with one question.

A line of a file is one of

    "Why is the sky blue?"
    [{"role": "user", "content": [{"type": "image", "path": "a.png"}, {"type": "text", "text": "What is this?"}]}]
    {"messages": [...], "id": "7"}
    {"prompt": "What is different?", "image": ["a.png", "b.png"], "id": "8"}
    {"prompt": "What happens?", "video": "a.mp4"}
    [{"role": "user", "content": [{"type": "video", "path": "a.mp4", "use_audio_in_video": true}]}]
    {"prompt": "What is this sound?", "audio": "a.wav"}

Paths are relative to the file's folder, or to a given folder. Other keys of an object are not read.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, NoReturn, Protocol

from mllm_jax.data.message import MEDIA, Image, Message, Part, Text, Video, conversation
from mllm_jax.datasets.record_checks import encodable, may_name_file, short
from mllm_jax.errors import DataError, MllmError
from mllm_jax.files import open_regular, parse_json
from mllm_jax.generation.embed import find_images

LINE_BYTES = 64 << 20
SHOWN = ("image", "video", "audio")  # keys beside "prompt", in the order in which the media come before it
MEND = "correct the line, or leave it out"


@dataclass(frozen=True)
class Prompt:
    """One of many prompts.

    Attributes:
        index: its number, from 0.
        place: its file and line, or its path, for messages.
        id: its name, or None.
        messages: the conversation; an error if it cannot be read.
        image: for a folder, the image's path in it.
    """

    index: int
    place: str
    id: str | int | None
    messages: tuple[Message, ...] | MllmError
    image: str | None = None


class Prompts(Protocol):
    """An iterable of prompts.

    Attributes:
        digest: equal only for equal prompts.
    """

    @property
    def digest(self) -> str: ...

    def __len__(self) -> int: ...

    def __iter__(self) -> Iterator[Prompt]: ...


class PromptFile:
    """The conversations of a .jsonl file.

    Args:
        media: the folder that paths in the file are relative to; None is the file's folder.

    Raises:
        DataError: the file cannot be read, is of another kind, or has no prompts.
    """

    def __init__(self, path: Path, media: Path | None = None):
        self.path, self.media = path, path.parent if media is None else media
        if path.suffix != ".jsonl":
            raise DataError(
                f"the prompts {path}", "a .jsonl file, one prompt a line, or a folder", "rename or convert it"
            )
        if not self.media.is_dir():
            raise DataError(f"the media of prompts in {self.media}", "a folder that exists", "correct the path")
        if not len(self):
            raise DataError(f"the prompts {path}: none", "at least one line", "add prompts")

    @cached_property
    def _facts(self) -> tuple[int, str]:
        count, digest = 0, hashlib.sha256()
        for _, line in self._lines():
            digest.update(line)
            count += 1
        return count, digest.hexdigest()

    @property
    def digest(self) -> str:
        return self._facts[1]

    def __len__(self) -> int:
        return self._facts[0]

    def __iter__(self) -> Iterator[Prompt]:
        for index, (number, line) in enumerate(self._lines()):
            place = f"{self.path}, line {number}"
            try:
                name, messages = self._read(line, place)
            except MllmError as error:
                name, messages = None, error
            yield Prompt(index, place, name, messages)

    def _lines(self) -> Iterator[tuple[int, bytes]]:
        """Yields the lines that are not empty with their numbers; of a line that is too long, its beginning."""
        try:
            with open_regular(self.path, DataError) as file:
                number, first = 1, True
                while line := file.readline(LINE_BYTES + 1):
                    if first and line.strip():
                        yield number, line
                    first = line.endswith(b"\n")
                    number += first
        except OSError as error:
            reason = error.strerror or error
            given = f"the prompts {self.path} cannot be read ({reason})"
            raise DataError(given, "a file that exists and may be read", "correct the path") from error

    def _read(self, line: bytes, place: str) -> tuple[str | int | None, tuple[Message, ...]]:
        if len(line) > LINE_BYTES:
            raise DataError(f"a line of more than {LINE_BYTES:,} bytes", f"at most {LINE_BYTES:,}", MEND)
        record = parse_json(line, place, DataError, object, todo=MEND)
        name = record.get("id") if isinstance(record, dict) else None
        if name is not None and (isinstance(name, bool) or not isinstance(name, str | int) or not encodable(str(name))):
            _refuse(f"id {short(name)}", "a text or a whole number")
        messages = _asked(record) if isinstance(record, dict) else conversation(record)
        return name, tuple(self._found(message) for message in messages)

    def _found(self, message: Message) -> Message:
        """Completes the paths of a message's media."""
        if not encodable(message.role) or not encodable(message.text):
            _refuse(f"a text {short(message.text)!a}, half of a pair of surrogates in it", "text that UTF-8 can write")
        if isinstance(message.content, str):
            return message
        return replace(message, content=tuple(self._medium(part) for part in message.content))

    def _medium(self, part: Part) -> Part:
        if isinstance(part, Text):
            return part
        frames = isinstance(part, Video) and isinstance(part.source, list)
        return replace(part, source=[*map(self._path, part.source)] if frames else self._path(part.source))

    def _path(self, name: Any) -> str:
        if not may_name_file(name) or re.match(r"[A-Za-z][A-Za-z0-9+.-]+:", name):
            _refuse(f"the medium {short(name)}", "the path of a file; what is elsewhere is fetched first")
        return str(self.media / name)


def _asked(record: dict[str, Any]) -> tuple[Message, ...]:
    if ("messages" in record) == ("prompt" in record):
        _refuse(f"an object with {short(sorted(record))}", 'either "messages" or "prompt"')
    if "messages" in record:
        for kind in SHOWN:
            if kind in record:
                _refuse(f'"{kind}" beside "messages"', f"{kind}s inside the messages")
        return conversation(record["messages"])
    text, media = record["prompt"], []
    for kind in SHOWN:
        names = record.get(kind, [])
        media += map(MEDIA[kind], names if isinstance(names, list) else [names])
    if not isinstance(text, str):
        _refuse(f"prompt {short(text)}", "a text")
    return (Message("user", (*media, Text(text)) if media else text),)


def _refuse(given: str, expected: str) -> NoReturn:
    raise DataError(given, expected, MEND)


class PromptFolder:
    """One question about each image in a folder, at any depth, sorted by name.

    Raises:
        DataError: the folder does not exist or has no images.
    """

    def __init__(self, folder: Path, question: str):
        self.folder, self.question = folder, question
        self._images = [path.relative_to(folder) for path in find_images([folder])]

    @cached_property
    def digest(self) -> str:
        names = "\0".join([self.question, *map(str, self._images)])
        return hashlib.sha256(names.encode(errors="surrogateescape")).hexdigest()

    def __len__(self) -> int:
        return len(self._images)

    def __iter__(self) -> Iterator[Prompt]:
        for index, image in enumerate(self._images):
            path, name = self.folder / image, str(image)
            messages = Message("user", (Image(str(path)), Text(self.question)))
            if encodable(name):
                yield Prompt(index, str(path), name, (messages,), name)
            else:
                error = DataError(f"the name {name!a}", "a name in UTF-8", "rename the file")
                yield Prompt(index, ascii(str(path)), None, error)
