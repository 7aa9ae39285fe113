"""Builds examples from questions and answers about emoji."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from mllm_jax.data.images import Drawn
from mllm_jax.data.message import Example, Image, Message, Segment, Text


@dataclass(frozen=True)
class Turn:
    """One question and its answer; `task` is the skill that it trains or measures."""

    question: str
    answer: str
    task: str


def asked(turns: Sequence[Turn], draw: Sequence[Callable[[], np.ndarray]] = (), context: str = "") -> Example:
    """Builds a conversation about images, or about the text `context` instead."""
    opening = (*(Image(Drawn(each)) for each in draw), *((Text(context),) if context else ()))
    messages = []
    for turn in turns:
        messages += [Message("user", (*opening, Text(turn.question))), Message("assistant", turn.answer)]
        opening = ()
    return Example(tuple(messages))


def captioned(captions: Sequence[str], draw: Callable[[], np.ndarray], regions: bool = False) -> Example:
    """Builds an example of an image and its captions; with `regions`, caption i describes region i."""
    said = tuple(Message("assistant", caption) for caption in captions)
    segments = tuple(Segment((number + 1,), number if regions else None) for number in range(len(said)))
    return Example((Message("user", (Image(Drawn(draw)),)), *said), segments)
