"""Valid and invalid forms of a conversation."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from mllm_jax.data.message import (
    Audio,
    Example,
    Image,
    Message,
    Text,
    Video,
    conversation,
    conversations,
)
from mllm_jax.errors import DataError

PIXELS = np.zeros((2, 2, 3), np.uint8)
HI = Message("user", "hi")
DICT = {"role": "user", "content": "hi"}


@pytest.mark.parametrize("given", ["hi", HI, [HI], (HI,), [DICT], (DICT,)], ids=repr)
def test_one_question_in_every_form(given):
    assert conversation(given) == (HI,)
    assert conversations(given) == ([(HI,)], False)


def test_several_turns_messages_and_dicts_mixed():
    answer = Message("assistant", "yes?")
    talk = conversation([DICT, answer, {"role": "user", "content": "no"}])
    assert talk == (HI, answer, Message("user", "no"))
    system = conversation([{"role": "system", "content": ""}, DICT])
    assert [message.role for message in system] == ["system", "user"] and system[0].content == ""


@pytest.mark.parametrize(
    "given",
    [["hi", "hi"], ("hi", "hi"), [[HI], "hi"], [[DICT], [HI]], [(DICT,), "hi"]],
    ids=repr,
)
def test_several_conversations(given):
    assert conversations(given) == ([(HI,), (HI,)], True)


def test_a_list_of_one_text_is_a_list():
    assert conversations(["hi"]) == ([(HI,)], True)
    assert conversations([]) == ([], True)


def test_parts_in_the_form_of_transformers():
    frames, sound = [PIXELS, PIXELS], np.zeros(4, np.float32)
    (message,) = conversation(
        [
            {
                "role": "user",
                "content": [
                    {"type": "image", "image": PIXELS},
                    {"type": "image", "path": "a.png"},
                    {"type": "image"},
                    {"type": "text", "text": "what?"},
                    {"type": "video", "video": frames, "fps": 2.0, "times": [0.0, 0.5]},
                    {"type": "video", "path": Path("a.mp4"), "rate": 7},
                    {"type": "audio", "audio": sound, "rate": 16_000, "fps": 1},
                ],
            }
        ]
    )
    image, path, beside, text, video, file, audio = message.parts
    assert isinstance(image, Image) and image.source is PIXELS
    assert isinstance(path, Image) and path.source == "a.png"
    assert isinstance(beside, Image) and beside.source is None
    assert text == Text("what?")
    assert isinstance(video, Video) and (video.source, video.fps, video.times) == (frames, 2.0, [0.0, 0.5])
    assert isinstance(file, Video) and (file.source, file.fps, file.times) == (Path("a.mp4"), None, None)
    assert isinstance(audio, Audio) and audio.source is sound and audio.rate == 16_000


def test_parts_may_be_given_as_they_are():
    image = Image(b"bytes")
    (message,) = conversation([{"role": "user", "content": (image, {"type": "text", "text": "a"}, Text("b"))}])
    assert message.content == (image, Text("a"), Text("b"))
    assert message.text == "a b" and message.parts == message.content
    assert HI.parts == (Text("hi"),) and HI.text == "hi"
    assert Example((HI, message, Message("user", (Video(), Audio())))).media[0] is image
    assert [type(part) for part in Example((message, Message("user", (Video(), Audio())))).media] == [
        Image,
        Video,
        Audio,
    ]


@pytest.mark.parametrize(
    "given",
    [
        None, 7, b"hi", [], (), {}, DICT, {"role": "user"}, [7], [None], [HI, "hi"], [HI, 7], [{"role": "user"}],
        [{"content": "hi"}], [{"role": 1, "content": "hi"}], [{"role": "user", "content": None}],
        [{"role": "user", "content": 7}], [{"role": "user", "content": b"hi"}],
    ],
    ids=repr,
)  # fmt: skip
def test_what_is_no_conversation_is_refused(given):
    with pytest.raises(DataError) as refusal:
        conversation(given)
    assert "a conversation given as" in refusal.value.given
    assert "several conversations" in refusal.value.expected and refusal.value.todo


@pytest.mark.parametrize("given", [None, 7, [7, 8], [[]], [["hi", "there"]], [HI, "hi"], DICT], ids=repr)
def test_what_is_none_of_several_is_refused(given):
    with pytest.raises(DataError, match="a conversation given as"):
        conversations(given)


@pytest.mark.parametrize(
    "part,kind",
    [
        ({"type": "smell", "path": "a"}, "smell"),
        ({"type": "text"}, "text"),
        ({"type": "text", "text": 7}, "text"),
        ({"text": "hi"}, "dict"),
        ({"type": ["image"]}, "image"),
        (PIXELS, "ndarray"),
        ("hi", "str"),
        (None, "NoneType"),
    ],
    ids=str,
)
def test_a_part_of_another_type_is_refused(part, kind):
    for content in ([part], [{"type": "image"}, part]):
        with pytest.raises(DataError) as refusal:
            conversation([{"role": "user", "content": content}])
        assert "a part of type" in refusal.value.given and kind in refusal.value.given
        assert refusal.value.expected == "text, image, video, audio" and refusal.value.todo


def test_a_long_refusal_is_short():
    with pytest.raises(DataError) as refusal:
        conversation([{"role": "user", "content": {"x": "y" * 100_000}}])
    assert len(str(refusal.value)) < 1_000
