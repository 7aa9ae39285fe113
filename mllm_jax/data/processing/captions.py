"""Texts as the text encoder of a generator reads them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from mllm_jax.data.tokenizer import Tokenizer


@dataclass(frozen=True)
class Captions:
    """The conversion of captions to ids.

    Attributes:
        words: the text encoder's tokenizer.
        length: ids of a caption; shorter ones are padded.
        longest: ids of a caption without its padding, at most `length`.
    """

    words: Any
    length: int
    longest: int

    @classmethod
    def of(cls, words: Any, length: int) -> Captions:
        """Returns the conversion for a text encoder of `length` ids, of which a tokenizer may allow fewer."""
        allowed = length if isinstance(words, Tokenizer) else words.backend.model_max_length
        return cls(words, length, min(length, allowed))

    def ids(self, text: str) -> list[int]:
        """Encodes a caption, uncut, with the tokens that the text encoder expects around it."""
        return self.words.caption_ids(text) if isinstance(self.words, Tokenizer) else self.words.encode(text)

    def padded(self, text: str) -> np.ndarray:
        """Returns the ids int32[length] of a caption; what does not fit is cut off before its end token."""
        ids = self.cut(text)
        return np.asarray(ids + [self.words.pad_token_id or 0] * (self.length - len(ids)), np.int32)

    def cut(self, text: str) -> list[int]:
        """Encodes a caption; what does not fit is cut off before its end token."""
        ids = self.ids(text)
        return ids if len(ids) <= self.longest else [*ids[: self.longest - 1], ids[-1]]

    def left_out(self, text: str) -> str:
        """Returns the end of a caption that `padded` cuts off."""
        ids = self.ids(text)
        return self.words.decode(ids[self.longest - 1 : -1]).strip() if len(ids) > self.longest else ""

    def fingerprint(self) -> str:
        """Returns a text that differs if ids would."""
        return repr([self.words.fingerprint(), self.length, self.longest])
