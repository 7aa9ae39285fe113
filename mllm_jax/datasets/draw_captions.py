"""Any source of images with captions as requests to draw, for models that produce images."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from mllm_jax.data.message import Example, Image, Message, Text
from mllm_jax.data.source import Source
from mllm_jax.errors import ConfigError, DataError


@dataclass(frozen=True)
class DrawCaptions:
    """A source's config (anything with `build() -> Source`) whose images are drawn from their captions.

    The caption of an example is that of its first image, or else its last text.

    Attributes:
        request: the user's message; {caption} stands for the caption.
    """

    source: Any
    request: str = "Generate an image: {caption}"

    def __post_init__(self):
        if self.request.count("{caption}") != 1:
            raise ConfigError(f"DrawCaptions: request {self.request!r}", "a text with {caption} once", "change it")

    def build(self) -> CaptionsSource:
        return CaptionsSource(self.source.build(), self.request)


class CaptionsSource:
    """See `DrawCaptions`."""

    def __init__(self, source: Source, request: str):
        self.source, self.request, self.name = source, request, f"{source.name} (to draw)"

    def __len__(self) -> int:
        return len(self.source)

    def example(self, index: int) -> Example:
        """Returns a request and its image. Raises DataError: the example has no image, or no caption."""
        found = self.source.example(index)
        parts = [part for message in found.messages for part in message.parts]
        image = next((part for part in parts if isinstance(part, Image)), None)
        texts = [part.text.strip() for part in parts if isinstance(part, Text)]
        caption = (image.caption if image is not None else None) or (texts[-1] if texts else "")
        if image is None or not caption:
            raise DataError(
                f"an example without {'an image' if image is None else 'a caption'}",
                "an image and its caption",
                "drop it, or take another source",
            )
        asked = Message("user", self.request.replace("{caption}", caption))
        drawn = replace(image, caption=caption)
        return replace(found, messages=(asked, Message("assistant", (drawn,))), segments=())

    def fingerprint(self) -> str:
        return f"{self.request!r} of {self.source.fingerprint()}"
