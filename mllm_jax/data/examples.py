"""What every source gives to the pipeline: conversations of questions and answers, with or without pictures."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import numpy as np


@dataclass(frozen=True)
class Turn:
    """One question and its answer; `task` names the skill it trains or measures.

    A caption is a turn without a question; `place` is the media token of the picture that it describes, None the whole.
    `images_at` are the places in the question's text, in characters, at which pictures stand; where no turn of a
    conversation has any, its pictures stand before the first question.
    """

    question: str
    answer: str
    task: str
    place: int | None = None
    images_at: tuple[int, ...] | None = None


@dataclass(frozen=True)
class Conversation:
    """Turns about `num_images` pictures, or about the text `context` that stands in place of a picture.

    `plain`: pictures and a caption, without a template around them, as LLaVA is pretrained.
    """

    num_images: int
    turns: tuple[Turn, ...]
    context: str = ""
    plain: bool = False

    @property
    def pictures_first(self) -> bool:
        """Whether all pictures stand before the first question."""
        first, *others = [turn.images_at or () for turn in self.turns]
        return not any(first) and not any(others)


@runtime_checkable
class Source(Protocol):
    """Random access to conversations: a pure function of the source's settings and an index."""

    name: str

    def __len__(self) -> int: ...

    def conversation(self, index: int) -> Conversation:
        """The text of example `index`; decodes no picture."""
        ...

    def images(self, index: int) -> list[np.ndarray]:
        """The pictures of example `index`, in order: uint8 [image_size, image_size, 3] each."""
        ...

    def fingerprint(self) -> str:
        """A short text that changes whenever the data or the questions change."""
        ...
