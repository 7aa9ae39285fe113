"""The text of ids that CTC decoding returns, by the vocabulary in a checkpoint's folder."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from mllm_jax.errors import DataError
from mllm_jax.files import read_json

_VOCABULARY, _SETTINGS, _CLASS = "vocab.json", "tokenizer_config.json", "Wav2Vec2CTCTokenizer"


class CTCTokenizer:
    """Decodes ids as transformers' Wav2Vec2CTCTokenizer does.

    Args:
        backend: a Wav2Vec2CTCTokenizer.
    """

    def __init__(self, backend: Any):
        self.backend = backend

    @classmethod
    def load(cls, folder: str | Path) -> CTCTokenizer:
        """Reads vocab.json and tokenizer_config.json in a model's folder, without running any code in it.

        Raises:
            DataError: there is no vocabulary, it cannot be read, or another class of tokenizers wrote it.
        """
        folder = Path(folder)
        if not (folder / _VOCABULARY).is_file():
            raise DataError(
                f"no {_VOCABULARY} in {folder}",
                f"the vocabulary of a {_CLASS} beside the weights",
                "copy the tokenizer's files there, as its repository has them; "
                "a model without a vocabulary must be fine-tuned with one first",
            )
        try:
            named = read_json(folder / _SETTINGS, DataError).get("tokenizer_class", _CLASS)
        except FileNotFoundError:
            named = _CLASS
        except OSError as error:
            raise _unreadable(folder, str(error)) from error
        if named != _CLASS:
            raise DataError(
                f"{folder / _SETTINGS} with tokenizer_class={named!r:.100}", _CLASS, "decode its ids with transformers"
            )
        from transformers import Wav2Vec2CTCTokenizer

        try:
            return cls(Wav2Vec2CTCTokenizer.from_pretrained(str(folder), local_files_only=True))
        except Exception as error:  # a vocabulary that is no object of ids raises many types
            raise _unreadable(folder, f"{type(error).__name__}: {str(error)[:1_000]}") from error

    @property
    def blank(self) -> int:
        """The id of the blank, which is the padding token."""
        return self.backend.pad_token_id

    def decode(self, ids: Iterable[int]) -> str:
        """Decodes one row of `ctc_greedy`; negative ids are left out, repeats are letters."""
        kept = [int(i) for i in ids if i >= 0]
        return self.backend.decode(kept, group_tokens=False)


def _unreadable(folder: Path, reason: str) -> DataError:
    return DataError(
        f"the tokenizer in {folder}: {reason}",
        f"{_VOCABULARY} with an id for each token, and {_SETTINGS} of a {_CLASS}",
        "restore them from the checkpoint's origin",
    )
