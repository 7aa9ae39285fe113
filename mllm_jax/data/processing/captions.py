"""Texts as the text encoder of a generator reads them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np


@dataclass(frozen=True)
class Captions:
    """The conversion of captions to ids.

    Attributes:
        words: the text encoder's tokenizer, of either class.
        length: ids of a caption; shorter ones are padded.
        longest: ids of a caption without its padding, at most `length`.
    """

    words: Any
    length: int
    longest: int

    @classmethod
    def of(cls, words: Any, length: int) -> Captions:
        """Returns the conversion for a text encoder of `length` ids, of which a tokenizer may allow fewer."""
        return cls(words, length, min(length, words.longest))

    def read(self, text: str) -> tuple[list[int], str]:
        """Returns the ids of a caption, and its end that does not fit and is cut off before the end token."""
        ids = self.words.caption_ids(text)
        if len(ids) <= self.longest:
            return ids, ""
        kept = self.longest - 1
        return [*ids[:kept], ids[-1]], self.words.decode(ids[kept:-1]).strip()

    def pad(self, ids: list[int]) -> np.ndarray:
        """Returns int32[length]."""
        return np.asarray(ids + [self.words.pad_token_id or 0] * (self.length - len(ids)), np.int32)

    def padded(self, text: str) -> np.ndarray:
        """Returns the ids int32[length] of a caption; what does not fit is left out."""
        return self.pad(self.read(text)[0])

    def fingerprint(self) -> str:
        """Returns a text that differs if ids would."""
        return repr([self.words.fingerprint(), self.length, self.longest])


@dataclass(frozen=True)
class JoinedCaptions:
    """The conversion of a caption for several text encoders, whose ids follow one another, each padded to its length.

    Attributes:
        each: by encoder.
    """

    each: tuple[Captions, ...]

    @property
    def length(self) -> int:
        """The number of ids of a caption."""
        return sum(captions.length for captions in self.each)

    @property
    def longest(self) -> int:
        """The number of ids of a caption that every encoder reads whole."""
        return min(captions.longest for captions in self.each)

    def read(self, text: str) -> tuple[list[int], str]:
        """Returns the ids of a caption, padding included, and the end that an encoder does not read."""
        found = [captions.read(text) for captions in self.each]
        ids = [captions.pad(own).tolist() for captions, (own, _) in zip(self.each, found, strict=True)]
        return sum(ids, []), max((left_out for _, left_out in found), key=len)

    def pad(self, ids: list[int]) -> np.ndarray:
        """Returns int32[length]."""
        return np.asarray(ids, np.int32)

    def padded(self, text: str) -> np.ndarray:
        """Returns the ids int32[length] of a caption; what does not fit is left out."""
        return self.pad(self.read(text)[0])

    def fingerprint(self) -> str:
        """Returns a text that differs if ids would."""
        return repr([captions.fingerprint() for captions in self.each])
