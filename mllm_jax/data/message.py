"""What a conversation is, everywhere: messages of typed parts; and what a model learns from, examples of them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from mllm_jax.errors import DataError

# A message of this role is no turn: text with media in it, written without a chat template, as in pretraining.
TEXT_ROLE = "text"


@dataclass(frozen=True)
class Text:
    """A piece of a message's text."""

    text: str


@dataclass(frozen=True, eq=False)
class Image:
    """An image.

    Attributes:
        source: a path, the bytes of a file, an image of Pillow, an array uint8[H, W, 3] or what `numpy.asarray` makes
            one of when it is read; None: it is given beside the conversation.
    """

    source: Any = None


@dataclass(frozen=True, eq=False)
class Video:
    """Frames in their order.

    Attributes:
        source: a path, the bytes of a file, an array uint8[F, H, W, 3], or a sequence of what an `Image` takes; None:
            it is given beside the conversation.
        fps: frames a second.
        times: of each frame, in seconds.
    """

    source: Any = None
    fps: float | None = field(default=None, kw_only=True)
    times: Sequence[float] | None = field(default=None, kw_only=True)


@dataclass(frozen=True, eq=False)
class Audio:
    """Sound.

    Attributes:
        source: a path, the bytes of a file, or samples float32[n]; None: it is given beside the conversation.
        rate: samples a second.
    """

    source: Any = None
    rate: int | None = field(default=None, kw_only=True)


Part = Text | Image | Video | Audio
MEDIA = {"image": Image, "video": Video, "audio": Audio}  # by modality, as dicts and branches name it


@dataclass(frozen=True)
class Message:
    """What one role says.

    Attributes:
        role: "user", "assistant" or "system"; "text" for a text that is written without a chat template.
        content: text, or parts in their order.
    """

    role: str
    content: str | tuple[Part, ...]

    @property
    def parts(self) -> tuple[Part, ...]:
        return (Text(self.content),) if isinstance(self.content, str) else self.content

    @property
    def text(self) -> str:
        """What the message says, without its media."""
        return " ".join(part.text for part in self.parts if isinstance(part, Text))


@dataclass(frozen=True)
class Segment:
    """Some messages of an example that stand together and apart from its others.

    Attributes:
        messages: their numbers.
        region: of a caption, the media token of the image that it describes; None is the whole image.
    """

    messages: tuple[int, ...]
    region: int | None = None


@dataclass(frozen=True)
class Example:
    """What a model learns from: a conversation, a text, an image with captions, or answers to compare.

    Attributes:
        messages: of which each segment holds some; media are shared by all segments.
        segments: none: all messages are one.
        id: names the example in messages to people.
    """

    messages: tuple[Message, ...]
    segments: tuple[Segment, ...] = ()
    id: str = ""

    @property
    def media(self) -> list[Part]:
        """All media in their order."""
        return [part for message in self.messages for part in message.parts if not isinstance(part, Text)]


Conversation = str | Message | Sequence[Message] | Sequence[Mapping[str, Any]]


def conversation(given: Conversation) -> tuple[Message, ...]:
    """Reads one conversation in any of its forms.

    Args:
        given: a str, which is one question; a Message; a list of Message; or a list of dicts in transformers' form,
            {"role": ..., "content": str | [{"type": "image", "path" | "image": ...}, {"type": "text", "text": ...}]}.

    Raises:
        DataError: none of these.
    """
    if isinstance(given, str):
        return (Message("user", given),)
    if isinstance(given, Message):
        return (given,)
    if not isinstance(given, Sequence) or not given:
        raise _no_conversation(given)
    return tuple(_message(each) for each in given)


def conversations(given: Conversation | Sequence[Conversation]) -> tuple[list[tuple[Message, ...]], bool]:
    """Reads one conversation, or a list of them: (the conversations, whether it was a list)."""
    several = (
        isinstance(given, Sequence)
        and not isinstance(given, (str, Message))
        and not any(isinstance(each, (Message, Mapping)) for each in given)
    )
    return ([conversation(each) for each in given], True) if several else ([conversation(given)], False)


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
                for name in ("fps", "times", "rate")
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
