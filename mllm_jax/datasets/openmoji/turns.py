"""Questions and answers about emoji as examples."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from mllm_jax.data.images import Drawn
from mllm_jax.data.message import Example, Image, Message, Segment, Text


@dataclass(frozen=True)
class Turn:
    """One question and its answer; `task` names the skill it trains or measures."""

    question: str
    answer: str
    task: str


def asked(turns: Sequence[Turn], draw: Sequence[Callable[[], np.ndarray]] = (), context: str = "") -> Example:
    """The conversation about images, or about the text `context` that takes the place of one."""
    opening = (*(Image(Drawn(each)) for each in draw), *((Text(context),) if context else ()))
    messages = []
    for turn in turns:
        messages += [Message("user", (*opening, Text(turn.question))), Message("assistant", turn.answer)]
        opening = ()
    return Example(tuple(messages))


def captioned(captions: Sequence[str], draw: Callable[[], np.ndarray], regions: bool = False) -> Example:
    """An image and its captions; with `regions` each describes the region of its number."""
    said = tuple(Message("assistant", caption) for caption in captions)
    segments = tuple(Segment((number + 1,), number if regions else None) for number in range(len(said)))
    return Example((Message("user", (Image(Drawn(draw)),)), *said), segments)
