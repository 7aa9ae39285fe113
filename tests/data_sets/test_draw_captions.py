"""Images with captions as requests to draw."""

from __future__ import annotations

from dataclasses import dataclass

import pytest

from mllm_jax import DrawCaptions, Example, Image, Message, Text
from mllm_jax.errors import ConfigError, DataError


@dataclass(frozen=True)
class Records:
    """Examples of given parts."""

    parts: tuple

    name = "records"

    def build(self):
        return self

    def __len__(self) -> int:
        return 1

    def example(self, index: int) -> Example:
        return Example((Message("text", self.parts),), id="7")

    def fingerprint(self) -> str:
        return "records"


@pytest.mark.parametrize(
    "parts",
    [(Image("a.png"), Text(" a red cat\n")), (Text("what is it?"), Image("a.png", caption="a red cat"), Text("a dog"))],
)
def test_a_caption_becomes_a_request(parts):
    source = DrawCaptions(Records(parts), "Draw {caption}!").build()
    asked, answered = source.example(0).messages
    assert (asked.role, asked.content, answered.role) == ("user", "Draw a red cat!", "assistant")
    [image] = answered.parts
    assert (image.source, image.caption, source.example(0).id, len(source)) == ("a.png", "a red cat", "7", 1)
    assert source.name == "records (to draw)" and "Draw" in source.fingerprint()


@pytest.mark.parametrize("parts,lacking", [((Text("a"),), "an image"), ((Image("a.png"), Text("  ")), "a caption")])
def test_examples_without_image_or_caption_are_refused(parts, lacking):
    with pytest.raises(DataError, match=f"without {lacking}"):
        DrawCaptions(Records(parts)).build().example(0)


def test_a_request_without_its_caption_is_refused():
    with pytest.raises(ConfigError, match="{caption} once"):
        DrawCaptions(Records(()), "Draw it")
