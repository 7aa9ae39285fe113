"""Asterisk's prompts: 25 minutes of one American speaker at 8 kHz, recorded for telephones, all with their texts.

    apt-get download asterisk-core-sounds-en-wav asterisk-core-sounds-en
    for package in asterisk-core-sounds-en*.deb; do dpkg-deb -x $package FOLDER; done

These are packages of Debian and Ubuntu (CC-BY-SA-3.0): the recordings, and their texts. `AsteriskSpeech(folder=...)`
names FOLDER, which is "/" for installed packages, or a folder with the recordings and the file core-sounds-en.txt, as
in Asterisk's own archive of the sounds.
"""

from __future__ import annotations

import gzip
import hashlib
import re
import wave
import zlib
from dataclasses import dataclass
from pathlib import Path

from mllm_jax.data.message import Audio, Example, Message, Text
from mllm_jax.datasets.folders import named_folder
from mllm_jax.datasets.held_out import check_split, stable_hash
from mllm_jax.errors import ConfigError, DataError
from mllm_jax.files import read_bytes

QUESTION = "What is said?"
HELD_OUT_SHARE = 0.1  # of the texts
FETCH = "unpack Debian's packages asterisk-core-sounds-en-wav and asterisk-core-sounds-en, and name the folder"
_VERSION = 1  # increase it whenever the splits, questions or texts change
_BYTES = 64 << 20  # of a file
_TEXTS = "core-sounds-en.txt"
_DEBIAN = ("usr/share/asterisk/sounds/en_US_f_Allison", f"usr/share/doc/asterisk-core-sounds-en/{_TEXTS}.gz")
_REMARK = re.compile(r"\[[^]]*\]|\([^)]*\)|<[^>]*>")  # "[sound of monkeys screaming]", "(1 second of silence)"
_SPOKEN = {"*": "star", "#": "pound"}  # the names of keys


@dataclass(frozen=True)
class AsteriskSpeech:
    """Recordings with one question each, which the spoken text answers; recordings without speech are left out.

    Attributes:
        split: "train", or "held_out": about a tenth of the texts, which no recording in training has.
        folder: of the unpacked packages, relative to MLLM_DATA_DIR; None: the installed packages.
        max_seconds: longer recordings are left out; Whisper hears 30 seconds at a time.
    """

    split: str = "train"
    folder: str | None = None
    max_seconds: float = 30.0

    def __post_init__(self):
        check_split("AsteriskSpeech", self.split)
        if not self.max_seconds > 0:
            raise ConfigError(f"AsteriskSpeech: max_seconds={self.max_seconds}", "more than 0", "correct it")

    def build(self) -> AsteriskSource:
        """Finds the recordings. Raises DataError: they or their texts are missing, or one cannot be read."""
        return AsteriskSource(self)


@dataclass(frozen=True)
class Prompt:
    """A recording.

    Attributes:
        name: its path without the suffix.
        original: the text as Asterisk has it.
        text: the text that is spoken, see `spoken`.
        seconds: its duration, from its header.
    """

    name: str
    original: str
    text: str
    seconds: float

    @property
    def held_out(self) -> bool:
        """True if its words belong to the held-out split; recordings with the same words are on one side."""
        words = " ".join(re.findall(r"[a-z0-9']+", self.text.lower()))
        return stable_hash(f"asterisk:{words}") < HELD_OUT_SHARE * 2**64


class AsteriskSource:
    """See `AsteriskSpeech`."""

    name = "asterisk_speech"
    sendable = True

    def __init__(self, settings: AsteriskSpeech):
        self.settings = settings
        self.folder, texts = _find(Path("/") if settings.folder is None else named_folder(settings.folder))
        prompts, self.digest = _prompts(self.folder, texts)
        held_out = settings.split == "held_out"
        self.prompts = [
            prompt for prompt in prompts if prompt.held_out == held_out and prompt.seconds <= settings.max_seconds
        ]

    def __len__(self) -> int:
        return len(self.prompts)

    def fingerprint(self) -> str:
        content = (self.name, _VERSION, self.settings.split, self.settings.max_seconds, self.digest)
        return hashlib.sha256(repr(content).encode()).hexdigest()[:16]

    def example(self, index: int) -> Example:
        if not 0 <= index < len(self):
            raise IndexError(f"index {index} of source {self.name}, which has {len(self)} examples")
        prompt = self.prompts[index]
        asked = (Audio(str(self.folder / f"{prompt.name}.wav")), Text(QUESTION))
        return Example((Message("user", asked), Message("assistant", prompt.text)), id=prompt.name)


def spoken(original: str) -> str:
    """Returns the text without remarks in brackets, with single spaces and the names of keys; "" is no speech."""
    text = _REMARK.sub(" ", original)
    for sign, name in _SPOKEN.items():
        text = text.replace(sign, f" {name} ")
    return " ".join(text.split())


def _find(folder: Path) -> tuple[Path, Path]:
    """Returns the folder of recordings and the file of their texts. Raises DataError: there are none."""
    for sounds, texts in (_DEBIAN, ("", f"{_TEXTS}.gz"), ("", _TEXTS)):
        if (folder / sounds).is_dir() and (folder / texts).is_file():
            return folder / sounds, folder / texts
    raise DataError(f"{folder} without {' and '.join(_DEBIAN)}", "these, or recordings with their texts", FETCH)


def _prompts(folder: Path, texts: Path) -> tuple[tuple[Prompt, ...], str]:
    """Returns all recordings with speech, and a digest of them."""
    found, digest = [], hashlib.sha256()
    for name, original in sorted(_texts(texts).items()):
        path = folder / f"{name}.wav"
        if path.is_file() and (text := spoken(original)):
            content = _read(path)
            digest.update(repr((name, text, hashlib.sha256(content).digest())).encode())
            found.append(Prompt(name, original, text, _seconds(path)))
    if not found:
        raise DataError(f"no recording of {texts.name} in {folder}", "files such as activated.wav", FETCH)
    return tuple(found), digest.hexdigest()


def _texts(file: Path) -> dict[str, str]:
    """Reads lines of a name, a colon and a text; those that begin with a semicolon are comments."""
    content = _read(file)
    try:
        content = gzip.decompress(content) if file.suffix == ".gz" else content
        lines = content.decode().splitlines()
    except (OSError, EOFError, zlib.error, ValueError) as error:
        raise DataError(f"{file} cannot be read ({error})", "a text, or a text compressed by gzip", FETCH) from error
    pairs = [line.partition(":") for line in lines if not line.startswith(";")]
    return {name.strip(): text.strip() for name, colon, text in pairs if colon}


def _read(path: Path) -> bytes:
    try:
        return read_bytes(path, _BYTES, DataError)
    except OSError as error:
        raise DataError(f"{path} cannot be read ({error})", "a file that may be read", FETCH) from error


def _seconds(path: Path) -> float:
    """Returns the duration, from the header."""
    try:
        with wave.open(str(path)) as file:
            return file.getnframes() / file.getframerate()
    except (wave.Error, EOFError, ZeroDivisionError) as error:
        raise DataError(f"{path} is no recording ({error})", "a WAV file of whole numbers", FETCH) from error
