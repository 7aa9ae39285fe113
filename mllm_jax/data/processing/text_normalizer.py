"""Whisper's normalisers of text, with which the error rates of speech recognition are compared."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from mllm_jax.errors import DataError
from mllm_jax.files import read_json

PACKAGE = "whisper_normalizer"  # its name for pip has a hyphen


@dataclass(frozen=True)
class BasicNormalizer:
    """Whisper's normaliser for every language: lower case, no punctuation, nothing in brackets.

    Attributes:
        remove_diacritics: write letters without accents.
        split_letters: separate all letters by spaces, for languages that are written without spaces.
    """

    remove_diacritics: bool = False
    split_letters: bool = False

    @cached_property
    def _normalizer(self) -> Callable[[str], str]:
        from transformers.models.whisper.english_normalizer import BasicTextNormalizer

        return BasicTextNormalizer(self.remove_diacritics, self.split_letters)

    def __call__(self, text: str) -> str:
        return self._normalizer(text).strip()


@dataclass(frozen=True)
class EnglishNormalizer:
    """Whisper's normaliser for English: also contractions, numbers in digits and American spelling.

    Attributes:
        folder: a model's, whose normalizer.json has the table of spellings. Without the file or the folder, the table
            of the package whisper-normalizer is used if it is installed.

    Raises:
        DataError: neither has a table, or it maps no words to words.
    """

    folder: str | None = None

    def __post_init__(self):
        self._normalizer  # noqa: B018  reads the table, so that its absence is refused here

    @cached_property
    def _normalizer(self) -> Callable[[str], str]:
        from transformers.models.whisper.english_normalizer import EnglishTextNormalizer

        return EnglishTextNormalizer(spellings(self.folder))

    def __call__(self, text: str) -> str:
        return self._normalizer(text).strip()


def spellings(folder: str | Path | None = None) -> dict[str, str]:
    """Returns the table of British spellings and their American ones; see `EnglishNormalizer`."""
    for path in (None if folder is None else Path(folder) / "normalizer.json", _packaged()):
        try:
            if path is not None:
                return _checked(read_json(path, DataError), path)
        except FileNotFoundError:
            continue
        except OSError as error:
            raise DataError(f"{path}: {error}", "JSON", "fetch the file again") from error
    raise DataError(
        f"Whisper's English normaliser without its table of spellings (no {folder or 'model folder'}/normalizer.json)",
        "normalizer.json in the model's folder, or the package whisper-normalizer",
        "fetch the file as well, or: pip install whisper-normalizer",
    )


def _packaged() -> Path | None:
    """Returns where the package keeps its table, without importing it."""
    found = importlib.util.find_spec(PACKAGE)
    places = found.submodule_search_locations if found is not None else None
    return Path(next(iter(places)), "normalizers", "english.json") if places else None


def _checked(table: Mapping[str, Any], path: Path) -> dict[str, str]:
    if not table or not all(isinstance(word, str) for word in table.values()):
        raise DataError(f"{path} with {len(table)} entries", "an object of words by words", "fetch the file again")
    return dict(table)
