"""Conversations in LLaVA's format: one JSON file of records, and a folder of images.

Examples are blip_laion_cc_sbu_558k.json of liuhaotian/LLaVA-Pretrain and llava_v1_5_mix665k.json of
liuhaotian/LLaVA-Instruct-150K. A file is a list of such records, or has one per line:

    {"id": "7", "image": "a.png", "conversations": [{"from": "human", "value": "<image>\\nWhat?"}, ...]}

A record names images inside the image folder only. Symbolic links in that folder are followed, also out of it: a record
cannot make one, and data sets are often linked into a folder. A link's target must be a regular file and an image.
"""

from __future__ import annotations

import functools
import hashlib
import mmap
import os
import re
import stat
from array import array
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from mllm_jax.data.images import Drawn, Size, image_size, read_image, resize
from mllm_jax.data.message import TEXT_ROLE, Example, Image, Message, Part, Text
from mllm_jax.datasets.record_checks import encodable, inside, may_name_file, short
from mllm_jax.errors import ConfigError, DataError
from mllm_jax.files import parse_json

T = TypeVar("T")
PLACEHOLDER = "<image>"
VERSIONS = ("chat", "plain")
_READING = 1  # raise it whenever the conversations of a file change
# Each is matched once at a position and never goes back, so that a file is read in one pass. No JSON has a NUL byte.
_BEGIN = re.compile(rb"(?:\xef\xbb\xbf)?[ \t\r\n]*+(\[?)[ \t\r\n]*+")
_BETWEEN = re.compile(rb"[ \t\r\n]*+,?[ \t\r\n]*+")
_REST = rb'(?:[^"{}\0]++|"[^"\\\0]*+(?:\\[^\0][^"\\\0]*+)*+")*+'  # braces in strings do not count
_TO_BRACE, _TO_ANY = re.compile(_REST + rb"([{}])"), re.compile(_REST)
_END = re.compile(rb"[ \t\r\n]*+(\]?)[ \t\r\n]*+")


@dataclass(frozen=True)
class LLaVARecords:
    """A file of LLaVA's records.

    Attributes:
        path: the file, JSON or JSON lines.
        image_folder: the folder that the records' image names are relative to.
        version: "chat" asks the human's questions; "plain" is LLaVA's pretraining: an image and its caption, without
            the question.
        image_size: side to which images are resized, for a model that a config composes; None: no resizing.
        data_dir: base of relative paths; None: the environment variable MLLM_DATA_DIR, else the working folder.
    """

    path: str
    image_folder: str
    version: str = "chat"
    image_size: int | None = None
    data_dir: str | None = None

    def __post_init__(self):
        if self.version not in VERSIONS:
            raise ConfigError(f"LLaVARecords: version {self.version!r}", f"one of {VERSIONS}", "change it")

    def build(self) -> LLaVASource:
        """Opens the file. Raises DataError: it does not exist, or does not consist of records."""
        return LLaVASource(self)


class LLaVASource:
    """The records of one file. In memory are two offsets per record; texts and images are read when needed."""

    sendable = True  # with the offsets, so that another process need not search them

    def __init__(self, settings: LLaVARecords):
        root = Path(settings.data_dir or os.environ.get("MLLM_DATA_DIR") or ".")
        self.settings, self.folder = settings, root / settings.image_folder
        self.name = Path(settings.path).name
        path = root / settings.path
        try:
            facts = path.stat()
            if not stat.S_ISREG(facts.st_mode):
                raise OSError("no regular file")  # reading a pipe would wait
            self._file = _open(path, facts.st_size, facts.st_mtime_ns)
        except (OSError, ValueError) as error:  # mmap refuses empty files with a ValueError
            raise DataError(
                f"the records {path} cannot be read ({error})",
                "a file of records",
                "download it, or set MLLM_DATA_DIR to the folder that its name is relative to",
            ) from error

    def __len__(self) -> int:
        return len(self._file.spans) // 2

    def fingerprint(self) -> str:
        """Returns a hash of the file's bytes and the settings; images count by their names only."""
        content = (_READING, self.settings.version, self.settings.image_size, self._file.digest)
        return hashlib.sha256(repr(content).encode()).hexdigest()[:16]

    def example(self, index: int) -> Example:
        """Returns a record with its images, which are read later. Raises DataError with the id of a bad record."""
        record = self._record(index)
        turns, names = _turns(record), _names(record)
        shown = sum(len(places) for _, places, _ in turns)
        if shown != len(names):
            _refuse(record, f"{PLACEHOLDER} {shown} time(s) for {len(names)} image(s)", "one for each image")
        images = iter(
            [Image(Drawn(partial(self._image, record, name), partial(self._size, record, name))) for name in names]
        )
        if self.settings.version == "plain":
            if len(turns) != 1 or not names:
                _refuse(
                    record, f"{len(turns)} turn(s) and {len(names)} image(s), as a caption", "one turn with an image"
                )
            return Example((Message(TEXT_ROLE, (*images, Text(turns[0][2]))),), id=_called(record))
        messages = []
        for question, places, answer in turns:
            asked = tuple(_cut(question, places, images))
            messages += [Message("user", asked), Message("assistant", answer)]
        return Example(tuple(messages), id=_called(record))

    def _image(self, record: dict[str, Any], name: str) -> np.ndarray:
        """Reads uint8[H, W, 3]. Raises DataError: the image does not exist, is damaged or is outside the folder."""
        image = self._read(read_image, record, name)
        return image if self.settings.image_size is None else resize(image, self.settings.image_size)

    def _size(self, record: dict[str, Any], name: str) -> Size:
        """Reads the size of the image from its file's header. Raises DataError as `_image` does."""
        size, side = self._read(image_size, record, name), self.settings.image_size
        return size if side is None else Size(side, side)

    def _read(self, read: Callable[[Path], T], record: dict[str, Any], name: str) -> T:
        path = inside(name)
        if path is None:
            _refuse(record, f"the image {short(name)}", "a file inside the folder of images")
        try:
            return read(self.folder / path)
        except DataError as error:
            raise DataError(f"{_called(record)}: {error.given}", error.expected, error.todo) from error

    def _record(self, index: int) -> dict[str, Any]:
        if not 0 <= index < len(self):
            raise IndexError(f"index {index} of source {self.name}, which has {len(self)} records")
        start, stop = self._file.spans[2 * index : 2 * index + 2]
        name = f"bytes {start:,} to {stop:,}"
        return parse_json(self._file.read(start, stop), name, DataError, todo="download the file again, or correct it")


# ---- records


def _turns(record: dict[str, Any]) -> list[tuple[str, tuple[int, ...], str]]:
    """Returns for each turn the question, the offsets of images in its characters, and the answer."""
    said = record.get("conversations")
    if not isinstance(said, list) or not all(isinstance(one, dict) for one in said):
        _refuse(record, "no list of `conversations`", 'messages such as {"from": "human", "value": "..."}')
    for one in said:
        if one.get("from") not in ("human", "gpt") or not isinstance(one.get("value"), str):
            _refuse(record, f"a message from {short(one.get('from'))}", 'text from "human" or "gpt"')
        if not encodable(one["value"]):
            _refuse(record, f"half a character in the text {short(one['value'])}", "text that UTF-8 can write")
        if one["from"] == "gpt" and not one["value"].strip():
            _refuse(record, "an empty answer", "an answer with text")
        if one["from"] == "gpt" and PLACEHOLDER in one["value"]:
            _refuse(record, f"{PLACEHOLDER} in an answer", "images in questions only")
    if said and said[0]["from"] == "gpt":
        said = said[1:]  # LLaVA's own training also leaves out an answer without a question
    if not said or said[-1]["from"] != "gpt":
        _refuse(record, "a dialogue without an assistant turn at its end", "an answer to each question")
    if [one["from"] for one in said] != ["human", "gpt"] * (len(said) // 2):
        _refuse(record, f"turns of {short([one['from'] for one in said])}", "a question and an answer in turn")
    asked = [_placed(one["value"]) for one in said[::2]]
    return [(*question, answer["value"].strip()) for question, answer in zip(asked, said[1::2], strict=True)]


def _placed(question: str) -> tuple[str, tuple[int, ...]]:
    """Returns the text without placeholders, and their offsets in it.

    Removes line breaks between images and at the ends of the text: chat templates separate images from text themselves.
    """
    pieces = [piece if piece.strip() else "" for piece in question.split(PLACEHOLDER)]
    texts = [i for i, piece in enumerate(pieces) if piece]
    if texts:
        pieces[texts[0]] = pieces[texts[0]].lstrip()
        pieces[texts[-1]] = pieces[texts[-1]].rstrip()
    ends = np.cumsum([len(piece) for piece in pieces[:-1]], dtype=int)
    return "".join(pieces), tuple(ends.tolist())


def _cut(question: str, places: tuple[int, ...], images: Iterator[Image]) -> Iterator[Part]:
    """Yields the text, cut at its images, and the images."""
    start = 0
    for place in places:
        if question[start:place]:
            yield Text(question[start:place])
        yield next(images)
        start = place
    if question[start:]:
        yield Text(question[start:])


def _names(record: dict[str, Any]) -> list[str]:
    names = record.get("image")
    names = [] if names is None else [names] if isinstance(names, str) else names
    if not isinstance(names, list) or not all(isinstance(name, str) and name for name in names):
        _refuse(record, f"image={short(names)}", "a name, or a list of names")
    for name in names:
        if not may_name_file(name):
            _refuse(record, f"image={short(name)}", "a name that a file can have")
    return names


def _called(record: dict[str, Any]) -> str:
    return f"record {short(record.get('id', '(without an id)'))}"


def _refuse(record: dict[str, Any], given: str, expected: str):
    raise DataError(f"{_called(record)}: {given}", expected, "correct the record, or leave it out")


# ---- the file


_HELD = 32 << 20  # bytes of a mapped file that are read before the process releases them


class _File:
    """A mapped file, the offsets of its records' ends (two int64 for each), and a digest of its bytes.

    The process releases the pages that it has read from time to time, so that its memory does not grow to the size of
    the file; they stay in the system's cache.
    """

    def __init__(self, path: Path, size: int, changed: int, spans: array | None = None, digest: str = ""):
        self._sent = path.absolute(), size, changed
        with open(path, "rb") as file:
            self.content = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        self._read = 0
        self.spans = _spans(self.content, path, self._let_go) if spans is None else spans
        self.digest = self._digest() if spans is None else digest

    def __reduce__(self):
        return _reopened, (*self._sent, self.spans, self.digest)

    def read(self, start: int, stop: int) -> bytes:
        found = self.content[start:stop]
        self._let_go(stop - start)
        return found

    def _let_go(self, more: int) -> None:
        self._read += more
        if self._read > _HELD and hasattr(mmap, "MADV_DONTNEED"):
            self._read = 0
            self.content.madvise(mmap.MADV_DONTNEED)

    def _digest(self) -> str:
        digest = hashlib.blake2b(digest_size=16)
        for start in range(0, len(self.content), _HELD):
            digest.update(self.read(start, start + _HELD))
        return digest.hexdigest()


@functools.lru_cache(maxsize=4)
def _open(path: Path, size: int, changed: int) -> _File:
    """Opens a file and finds its records; `size` and `changed` make the cache read a replaced file again."""
    return _File(path, size, changed)


def _reopened(path: Path, size: int, changed: int, spans: array, digest: str) -> _File:
    """Opens the file in another process. Raises DataError: it has changed."""
    facts = path.stat()
    if (facts.st_size, facts.st_mtime_ns) != (size, changed):
        raise DataError(f"{path}, which changed while it was measured", "a file that does not change", "start again")
    return _File(path, size, changed, spans, digest)


def _spans(content: mmap.mmap, path: Path, passed: Callable[[int], None]) -> array:
    """Finds the offsets of the outermost braces in one pass.

    Args:
        passed: called with the number of bytes read, after each record.

    Raises:
        DataError: the file is no list or lines of objects; it names the first byte that does not fit.
    """
    spans = array("q")
    begin = _BEGIN.match(content)
    at = begin.end()
    while content[at : at + 1] == b"{":
        spans.append(at)
        depth, at = 1, at + 1
        while depth:
            found = _TO_BRACE.match(content, at)
            if found is None:  # the end of the file, a string without an end, or a NUL byte
                raise _does_not_fit(content, _TO_ANY.match(content, at).end(), path)
            depth += 1 if found[1] == b"{" else -1
            at = found.end()
        spans.append(at)
        passed(at - spans[-2])
        at = _BETWEEN.match(content, at).end()
    # Go back to the end of the last record: no comma may follow it.
    last = _END.match(content, spans[-1] if spans else at)
    if not spans or bool(last[1]) != bool(begin[1]) or last.end() != len(content):
        raise _does_not_fit(content, max(at, last.end()), path)
    return spans


def _does_not_fit(content: mmap.mmap, at: int, path: Path) -> DataError:
    line, step = 1, 1 << 20
    for start in range(0, at, step):
        line += content[start : min(start + step, at)].count(b"\n")
    found = ascii(content[at : at + 1].decode("latin-1")) if at < len(content) else "the file's end"
    return DataError(
        f"{path}: no whole file of records; it is readable up to byte {at:,} (line {line:,}), where {found} is",
        "a JSON list of objects, or one object a line",
        "name the file of records, or download it again: it may have been cut short",
    )
