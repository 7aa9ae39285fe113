"""The examples of one source, laid out by index for a batch, or measured."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple, TypeVar

import numpy as np

from mllm_jax.data.images import Drawn, image_size
from mllm_jax.data.message import Example, Image, Message, Part, Video
from mllm_jax.data.processing.layouts import Layout
from mllm_jax.data.processing.media import Encoded, Lazy
from mllm_jax.data.processing.video import sized_frames, sound_of
from mllm_jax.data.retry import RetryPolicy, patiently
from mllm_jax.data.source import Source
from mllm_jax.errors import DataError

_ANY = Layout()
_MEASURING = 1  # raise it whenever the measured length of an example changes

T = TypeVar("T")


class Taken(NamedTuple):
    """The positions and slots of an example in a row.

    Attributes:
        slots: by modality; an absent modality needs none.
        dropped_turns: number of turns that did not fit.
    """

    length: int
    slots: Mapping[str, int]
    dropped_turns: int


@dataclass(frozen=True)
class SourceEncoder:
    """Lays out the examples of one source. Each measuring process gets a copy.

    Attributes:
        config: the source's, anything with `build() -> Source`; a process that gets a copy builds it.
        source: built from the config.
        processor: see `mllm_jax.models.processor.Processor`.
        length: the most positions of an example.
        layout, captions, learn: see `Mixture`.
        decodes: measuring decodes all media, and so finds damaged ones; if False, it reads only their sizes.
        patience: the retries of a source that fails to read.
    """

    config: Any
    source: Source
    processor: Any
    length: int
    layout: str = "conversation"
    captions: int = 1
    learn: str = "answers"
    decodes: bool = False
    patience: RetryPolicy = RetryPolicy()

    @property
    def name(self) -> str:
        return self.source.name

    def __reduce__(self):
        """Returns the pickled form: the source if it can be sent, else only its config, which the copy builds."""
        sent = self.source if getattr(self.source, "sendable", False) else None
        more = (self.processor, self.length, self.layout, self.captions, self.learn, self.decodes, self.patience)
        return _received, (self.config, sent, *more)

    def encode(self, index: int) -> Encoded:
        """Lays out one example; its arrays are also read with retries.

        Raises:
            DataError: the example cannot be used; it names source and index.
            ReadError: the source cannot be read at the moment, which is no fault of the example.
        """
        encoded = self._read(lambda: self._lay_out(self.source.example(index)), index)

        def patient(arrays: Mapping[str, np.ndarray]) -> Lazy:
            return Lazy(tuple(arrays), lambda name: self._read(partial(arrays.__getitem__, name), index))

        return replace(encoded, media=[replace(medium, arrays=patient(medium.arrays)) for medium in encoded.media])

    def measure(self, index: int) -> Taken:
        """Measures one example from its text and the sizes of its media; raises the same as `encode`."""
        if self.decodes:
            encoded = self.encode(index)
            for medium in encoded.media:
                dict(medium.arrays)  # some are decoded only when they are read
        else:
            layout = self.processor.layout
            encoded = self._read(lambda: self._lay_out(without_pixels(self.source.example(index), layout)), index)
        return Taken(encoded.length, encoded.slots, encoded.dropped_turns)

    def key(self) -> str:
        """Returns a name that differs if measured lengths would."""
        settings = [self.processor.fingerprint(), self.length, self.layout, self.captions, self.decodes]
        content = json.dumps([_MEASURING, self.source.fingerprint(), *settings])
        return hashlib.sha256(content.encode()).hexdigest()[:24]

    def _lay_out(self, example: Example) -> Encoded:
        if self.layout == "caption":
            return self.processor.encode_captions(example, self.length, self.captions)
        return self.processor.encode(example, self.length, self.learn)

    def _read(self, read: Callable[[], T], index: int) -> T:
        """Reads something of an example; a DataError names it."""
        name = f"{self.name}[{index}]"
        try:
            return patiently(read, name, self.patience)
        except DataError as error:
            raise DataError(f"{name}: {error.given}", error.expected, error.todo) from error


def without_pixels(example: Example, layout: Layout = _ANY) -> Example:
    """Replaces the images and frames of an example by their sizes.

    Args:
        layout: the model's; if positions do not depend on sizes, images that must be drawn for their sizes and frames
            that are given stay as they are.

    Raises:
        DataError: see `image_size` and `video_header`.
    """
    return replace(example, messages=tuple(_sized_message(message, layout) for message in example.messages))


def _sized_message(message: Message, layout: Layout) -> Message:
    if isinstance(message.content, str):
        return message
    return replace(message, content=tuple(_sized(part, layout) for part in message.parts))


def _sized(part: Part, layout: Layout) -> Part:
    if isinstance(part, Image):
        drawn = isinstance(part.source, Drawn) and part.source.size is None
        return part if drawn and not layout.needs_sizes else replace(part, source=image_size(part.source))
    if isinstance(part, Video) and (layout.needs_sizes or part.is_file):
        if part.use_audio_in_video:
            if not layout.hears_videos:
                return part  # it will be refused
            part = replace(part, use_audio_in_video=sound_of(part) or False)
        return sized_frames(part, layout.sampling, layout.needs_times)
    return part


def _received(config: Any, source: Source | None, *more: Any) -> SourceEncoder:
    return SourceEncoder(config, config.build() if source is None else source, *more)
