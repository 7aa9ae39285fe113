"""Any source without its pictures, for stages that learn from its text alone."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from mllm_jax.data.examples import Conversation, Source


@dataclass(frozen=True)
class TextOnly:
    """A source's config (anything with `build() -> Source`), of which the pictures are left out.

    Meant for the caption layout: questions about a picture that is not there have no answer.
    """

    source: Any

    def build(self) -> TextOnlySource:
        return TextOnlySource(self.source.build())


class TextOnlySource:
    """See `TextOnly`."""

    def __init__(self, source: Source):
        self.source, self.name = source, f"{source.name} (text)"

    def __len__(self) -> int:
        return len(self.source)

    def conversation(self, index: int) -> Conversation:
        return replace(self.source.conversation(index), num_images=0)

    def images(self, index: int) -> list[np.ndarray]:
        return []

    def fingerprint(self) -> str:
        return f"text of {self.source.fingerprint()}"
