"""Any source without its images, for stages that train on text alone."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from mllm_jax.data.message import Example, Text
from mllm_jax.data.source import Source


@dataclass(frozen=True)
class TextOnly:
    """A source's config (anything with `build() -> Source`) without its images.

    Meant for the caption layout: questions about a missing image have no answer.
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

    def example(self, index: int) -> Example:
        found = self.source.example(index)
        texts = [tuple(part for part in message.parts if isinstance(part, Text)) for message in found.messages]
        messages = tuple(replace(m, content=parts) for m, parts in zip(found.messages, texts, strict=True))
        return replace(found, messages=messages)

    def fingerprint(self) -> str:
        return f"text of {self.source.fingerprint()}"
