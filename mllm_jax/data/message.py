"""Conversations, which are messages of typed parts, and training examples of them."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from numbers import Integral, Real
from typing import Any

from mllm_jax.errors import DataError

# A message of this role is no turn but text with media, without a chat template, as in pretraining.
TEXT_ROLE = "text"


@dataclass(frozen=True)
class Text:
    """A piece of a message's text."""

    text: str


@dataclass(frozen=True, eq=False)
class Image:
    """An image.

    Attributes:
        source: a path, the bytes of a file, a Pillow image, an array uint8[H, W, 3] or an object that `numpy.asarray`
            converts to one when it is read; None: it is passed separately.
        caption: its description. A model that produces images learns to produce it from its caption.
    """

    source: Any = None
    caption: str | None = field(default=None, kw_only=True)


@dataclass(frozen=True, eq=False)
class Video:
    """Frames in order, each with its time.

    Attributes:
        source: a path or the bytes of a file, from which frames are sampled; or the frames, which need `fps` or
            `times`: an array uint8[F, H, W, 3] or a sequence of sources of an `Image`; None: it is passed separately.
        fps: frames per second; of a file, the rate at which frames are sampled instead of the model's.
        times: the time of each frame in seconds, for frames.
        num_frames: the number of frames to sample from a file; None: `fps`, or the model's number.
        use_audio_in_video: True: the model also hears the file's sound, in time with the frames, if the file has any;
            an `Audio`: it hears that, with frames or instead of the file's.
        caption: see `Image`.

    Raises:
        DataError: frames without times, times that do not fit the frames, a number that is not positive, or frames
            whose sound is not given.
    """

    source: Any = None
    fps: float | None = field(default=None, kw_only=True)
    times: Sequence[float] | None = field(default=None, kw_only=True)
    num_frames: int | None = field(default=None, kw_only=True)
    use_audio_in_video: bool | Audio = field(default=False, kw_only=True)
    caption: str | None = field(default=None, kw_only=True)

    def __post_init__(self):
        if wrong := _wrong_video(self):
            raise DataError(
                *wrong, "write Video(path), Video(frames, fps=...) or Video(frames, times=[...]): a frame has a time"
            )

    @property
    def is_file(self) -> bool:
        """True if the source is a path or the bytes of a file."""
        return isinstance(self.source, (str, os.PathLike, bytes))


@dataclass(frozen=True, eq=False)
class Audio:
    """Sound.

    Attributes:
        source: a path, the bytes of a file, or samples float32[n]; None: it is passed separately.
        rate: samples per second.
        caption: see `Image`.
    """

    source: Any = None
    rate: int | None = field(default=None, kw_only=True)
    caption: str | None = field(default=None, kw_only=True)


Part = Text | Image | Video | Audio
MEDIA = {"image": Image, "video": Video, "audio": Audio}  # by modality, the name in dicts and branches


@dataclass(frozen=True)
class Message:
    """One turn of a conversation, or a text.

    Attributes:
        role: "user", "assistant" or "system"; "text" for a text without a chat template.
        content: text, or parts in order.
    """

    role: str
    content: str | tuple[Part, ...]

    @property
    def parts(self) -> tuple[Part, ...]:
        return (Text(self.content),) if isinstance(self.content, str) else self.content

    @property
    def text(self) -> str:
        """The text of the message without its media."""
        return " ".join(part.text for part in self.parts if isinstance(part, Text))


@dataclass(frozen=True)
class Segment:
    """Some messages of an example that attend to one another and not to the others.

    Attributes:
        messages: their indices.
        region: the media token of the image that a caption describes; None is the whole image.
    """

    messages: tuple[int, ...]
    region: int | None = None


@dataclass(frozen=True)
class Example:
    """A training example: a conversation, a text, an image with captions, or answers to compare.

    Attributes:
        messages: each segment holds some; all segments share the media.
        segments: if empty, all messages are one segment.
        id: name of the example in messages to people.
    """

    messages: tuple[Message, ...]
    segments: tuple[Segment, ...] = ()
    id: str = ""

    @property
    def media(self) -> list[Part]:
        """All media in order."""
        return [part for message in self.messages for part in message.parts if not isinstance(part, Text)]


Conversation = str | Message | Sequence[Message] | Sequence[Mapping[str, Any]]


def conversation(given: Conversation) -> tuple[Message, ...]:
    """Reads one conversation in any of its forms.

    Args:
        given: a str, which is one question; a Message; a list of Message; or a list of dicts in transformers' form,
            {"role": ..., "content": str | [{"type": "image", "path" | "image": ...}, {"type": "text", "text": ...}]}.

    Raises:
        DataError: another form.
    """
    if isinstance(given, str):
        return (Message("user", given),)
    if isinstance(given, Message):
        return (given,)
    if not isinstance(given, Sequence) or not given:
        raise _no_conversation(given)
    return tuple(_message(each) for each in given)


def conversations(given: Conversation | Sequence[Conversation]) -> tuple[list[tuple[Message, ...]], bool]:
    """Reads one conversation or a list; returns the conversations, and whether it was a list."""
    several = (
        isinstance(given, Sequence)
        and not isinstance(given, (str, Message))
        and not any(isinstance(each, (Message, Mapping)) for each in given)
    )
    return ([conversation(each) for each in given], True) if several else ([conversation(given)], False)


def _wrong_video(video: Video) -> tuple[str, str] | None:
    """Returns what is wrong with a video, and what is expected; None if it is right."""
    source, fps, times, number = video.source, video.fps, video.times, video.num_frames
    if fps is not None and not (_is_number(fps) and 0 < fps < math.inf):
        return f"a video with fps={fps!r:.100}", "a positive number of frames a second"
    if number is not None and not (_is_number(number, Integral) and number > 0):
        return f"a video with num_frames={number!r:.100}", "a positive whole number"
    if not isinstance(video.use_audio_in_video, (bool, Audio)):
        return f"a video with use_audio_in_video={video.use_audio_in_video!r:.100}", "True, False or an Audio"
    if source is None:
        return None
    if video.is_file:
        if times is not None:
            return "a video's file with times", "a file alone: it has its own times"
        both = fps is not None and number is not None
        return ("a video's file with fps and num_frames", "one of the two") if both else None
    if not hasattr(source, "__len__") or getattr(source, "ndim", 4) != 4:
        shape = getattr(source, "shape", None)
        given = f"a {type(source).__name__}" if shape is None else f"an array {list(shape)}"
        return f"a video given as {given}", "a path, the bytes of a file, uint8[F, H, W, 3] or a list of images"
    if not len(source):
        return "a video of no frames", "at least one frame"
    if number is not None:
        return "frames with num_frames", "frames alone: all of them are shown"
    if video.use_audio_in_video is True:
        return "frames with use_audio_in_video=True", "use_audio_in_video=Audio(...): frames have no sound themselves"
    if fps is None and times is None:
        return f"a video of {len(source)} frames without their times", "fps or times"
    if times is None:
        return None
    listed = hasattr(times, "__len__") and all(_is_number(time) and math.isfinite(time) for time in times)
    if not listed or len(times) != len(source):
        given = f"{len(times)} times" if listed else f"times {times!r:.100}"
        return f"a video of {len(source)} frames with {given}", "a time in seconds for each frame"
    if any(later < earlier for earlier, later in pairwise(times)):
        return f"frames with times {list(times)!r:.100}", "times that do not decrease"
    return None


def _is_number(value: Any, kind: type = Real) -> bool:
    return isinstance(value, kind) and not isinstance(value, bool)


def _message(given: Any) -> Message:
    if isinstance(given, Message):
        return given
    if not isinstance(given, Mapping) or not isinstance(given.get("role"), str) or "content" not in given:
        raise _no_conversation(given)
    content = given["content"]
    if isinstance(content, str):
        return Message(given["role"], content)
    if not isinstance(content, Sequence) or isinstance(content, bytes):
        raise _no_conversation(given)
    return Message(given["role"], tuple(_parts(content)))


def _parts(content: Sequence[Any]) -> Iterator[Part]:
    for part in content:
        kind = part.get("type") if isinstance(part, Mapping) else None
        if isinstance(part, Part):
            yield part
        elif kind == "text" and isinstance(part.get("text"), str):
            yield Text(part["text"])
        elif isinstance(kind, str) and kind in MEDIA:
            source = next((part[name] for name in (kind, "path") if part.get(name) is not None), None)
            more = {
                name: part[name]
                for name in ("fps", "times", "num_frames", "use_audio_in_video", "rate", "caption")
                if name in part and name in MEDIA[kind].__dataclass_fields__
            }
            yield MEDIA[kind](source, **more)
        else:
            raise DataError(
                f"a message with a part of type {kind if kind is not None else type(part).__name__!r:.100}",
                f"text, {', '.join(MEDIA)}",
                "change the part: a Text, Image, Video or Audio, or a dict with its type",
            )


def _no_conversation(given: Any) -> DataError:
    return DataError(
        f"a conversation given as {type(given).__name__} {given!r:.80}",
        'a text, a list of Message, or of {"role": "user", "content": ...}; a list of these is several conversations',
        "change it",
    )
