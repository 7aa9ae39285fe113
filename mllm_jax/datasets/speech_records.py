"""Recordings with their transcripts from the user's own folder: a manifest of JSON lines, or LibriSpeech's files.

    {"audio_filepath": "a.wav", "text": "hello there", "duration": 1.2}    NeMo's manifest; the duration is optional
    {"audio": "a.wav", "sentence": "hello there", "id": "7"}               also `path`, and `text`

LibriSpeech's `*.trans.txt` have a recording's name without its suffix and its text on each line. A record names files
inside the folder of recordings only; see `mllm_jax.datasets.llava` for links.
"""

from __future__ import annotations

import hashlib
import math
import os
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NoReturn

from mllm_jax.data.audio import RATE, audio_length
from mllm_jax.data.message import Audio, Example, Message, Text
from mllm_jax.datasets.record_checks import encodable, inside, may_name_file, short
from mllm_jax.errors import ConfigError, DataError
from mllm_jax.files import parse_json, read_bytes

QUESTION = "Transcribe speech to text."
FILES, TEXTS = ("audio_filepath", "audio", "path"), ("text", "sentence")
SUFFIXES = (".flac", ".wav", ".ogg", ".mp3")  # of LibriSpeech's recordings
_VERSION = 1  # raise it whenever the same files give other examples
_BYTES = 2 << 30  # of a manifest
MEND = "correct the record, or leave it out"


@dataclass(frozen=True)
class SpeechRecords:
    """Recordings with one question each, which the transcript answers.

    Attributes:
        path: a manifest of JSON lines, or LibriSpeech's folder.
        audio_folder: the folder that the recordings' names are relative to; None: the manifest's own.
        question: what is asked about each recording.
        max_seconds: longer recordings are left out; their headers are read if a record gives no duration.
        data_dir: base of relative paths; None: the environment variable MLLM_DATA_DIR, else the working folder.
    """

    path: str
    audio_folder: str | None = None
    question: str = QUESTION
    max_seconds: float | None = None
    data_dir: str | None = None

    def __post_init__(self):
        if self.max_seconds is not None and not self.max_seconds > 0:
            raise ConfigError(f"SpeechRecords: max_seconds={self.max_seconds}", "more than 0, or None", "correct it")

    def build(self) -> SpeechSource:
        """Reads the transcripts. Raises DataError: they cannot be read, or are none; or a line is no record."""
        return SpeechSource(self)


@dataclass(frozen=True)
class SpeechRecord:
    """A recording: its file, its text, its id, its line in messages, and its seconds if the record gives them."""

    file: str
    text: str
    id: str
    place: str
    seconds: float | None = None


class SpeechSource:
    """See `SpeechRecords`. In memory are names and texts; recordings are read when needed."""

    sendable = True

    def __init__(self, settings: SpeechRecords):
        root = Path(settings.data_dir or os.environ.get("MLLM_DATA_DIR") or ".")
        path, folder, most = root / settings.path, settings.audio_folder, settings.max_seconds
        self.settings, self.name = settings, Path(settings.path).name
        records = list(_librispeech(path) if path.is_dir() else _manifest(path))
        self.folder = (path if path.is_dir() else path.parent) if folder is None else root / folder
        first: dict[str, str] = {}
        for one in records:
            if first.setdefault(one.file, one.place) != one.place:
                _refuse(one.place, f"{short(one.file)}, which is also in {first[one.file]}", "each recording once")
        self.recordings = [one for one in records if most is None or self._seconds(one) <= most]
        if not self.recordings:
            expected = "a manifest with records, or a folder with LibriSpeech's *.trans.txt"
            raise DataError(f"{path}: {len(records)} record(s), none to use", expected, "name another, or add records")

    def __len__(self) -> int:
        return len(self.recordings)

    def fingerprint(self) -> str:
        """Returns a hash of names, texts and the question; the recordings count by their names only."""
        content = (_VERSION, self.settings.question, [(one.file, one.text) for one in self.recordings])
        return hashlib.sha256(repr(content).encode()).hexdigest()[:16]

    def example(self, index: int) -> Example:
        """Returns a recording, which is read later. Raises DataError: there is no such file."""
        if not 0 <= index < len(self):
            raise IndexError(f"index {index} of source {self.name}, which has {len(self)} records")
        one = self.recordings[index]
        asked = (Audio(self._file(one)), Text(self.settings.question))
        return Example((Message("user", asked), Message("assistant", one.text)), id=one.id)

    def _file(self, one: SpeechRecord) -> str:
        file = os.path.join(self.folder, one.file)
        if not os.path.isfile(file):
            _refuse(one.place, f"no recording {file}", "a file", "correct the name, or audio_folder")
        return file

    def _seconds(self, one: SpeechRecord) -> float:
        return audio_length(self._file(one)) / RATE if one.seconds is None else one.seconds


def _manifest(path: Path) -> Iterator[SpeechRecord]:
    for place, line in _lines(path):
        record = parse_json(line, place, DataError, todo=MEND)
        seconds = record.get("duration")
        number = isinstance(seconds, int | float) and not isinstance(seconds, bool) and 0 < seconds < math.inf
        if seconds is not None and not number:
            _refuse(place, f"duration {short(seconds)}", "seconds, a number above 0")
        if record.get("offset"):
            _refuse(place, f"offset {short(record['offset'])}, a part of a recording", "whole recordings", "cut it out")
        file = _first(record, FILES, place)
        found = _recording(place, file, _first(record, TEXTS, place), str(record.get("id", file)))
        yield replace(found, seconds=seconds)


def _librispeech(folder: Path) -> Iterator[SpeechRecord]:
    for texts in sorted(folder.rglob("*.trans.txt")):
        for place, line in _lines(texts):
            name, _, text = line.decode(errors="surrogateescape").strip().partition(" ")
            names = [str(texts.parent.relative_to(folder) / f"{name}{suffix}") for suffix in SUFFIXES]
            yield _recording(place, next((n for n in names if os.path.isfile(folder / n)), names[0]), text, name)


def _lines(path: Path) -> Iterator[tuple[str, bytes]]:
    """Yields each line that is not empty, without a byte order mark, and its name in messages."""
    try:
        content = read_bytes(path, _BYTES, DataError).removeprefix(b"\xef\xbb\xbf")
    except OSError as error:
        raise DataError(f"the transcripts {path} cannot be read ({error})", "a file", "correct the path") from error
    lines = enumerate(content.split(b"\n"), start=1)
    return ((f"{path}, line {number:,}", line) for number, line in lines if line.strip())


def _first(record: dict[str, Any], names: tuple[str, ...], place: str) -> Any:
    if not any(name in record for name in names):
        _refuse(place, f"a record with {short(sorted(record))}", f"one of {', '.join(names)}")
    return next(record[name] for name in names if name in record)


def _recording(place: str, file: Any, text: Any, name: str) -> SpeechRecord:
    if not may_name_file(file) or (path := inside(file)) is None:
        _refuse(place, f"the recording {short(file)}", "a file inside the folder of recordings")
    if not isinstance(text, str) or not text.strip() or not encodable(text + name):
        _refuse(place, f"the text {short(text)}", "the words that are spoken, in UTF-8")
    return SpeechRecord(path, text.strip(), name, place)


def _refuse(place: str, given: str, expected: str, todo: str = MEND) -> NoReturn:
    raise DataError(f"{place}: {given}", expected, todo)
