"""The examples of one source, laid out by index: as a batch needs them, and as they are measured."""

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
from mllm_jax.data.processing.media import Encoded, Lazy
from mllm_jax.data.retry import Patience, patiently
from mllm_jax.data.source import Source
from mllm_jax.errors import DataError

_MEASURING = 1  # raise it whenever the same example is measured as another length

T = TypeVar("T")


class Taken(NamedTuple):
    """What an example takes of a row.

    Attributes:
        slots: by modality; one that is absent takes none.
        dropped_turns: how many did not fit.
    """

    length: int
    slots: Mapping[str, int]
    dropped_turns: int


@dataclass(frozen=True)
class SourceEncoder:
    """Lays out the examples of one source. A copy of it goes to each measuring process.

    Attributes:
        config: the source's, anything with `build() -> Source`; what a process builds that gets a copy.
        source: built of it.
        processor: see `mllm_jax.models.processor.Processor`.
        length: positions that an example may take.
        layout, captions, learn: see `Mixture`.
        decodes: measuring decodes all media, so that damaged ones are found; else it reads their sizes alone.
        patience: how long a source that fails to read is tried.
    """

    config: Any
    source: Source
    processor: Any
    length: int
    layout: str = "conversation"
    captions: int = 1
    learn: str = "answers"
    decodes: bool = False
    patience: Patience = Patience()

    @property
    def name(self) -> str:
        return self.source.name

    def __reduce__(self):
        """A source that can be sent goes as it is; any other is built again where the copy arrives."""
        sent = self.source if getattr(self.source, "sendable", False) else None
        more = (self.processor, self.length, self.layout, self.captions, self.learn, self.decodes, self.patience)
        return _received, (self.config, sent, *more)

    def encode(self, index: int) -> Encoded:
        """Lays out one example, whose arrays are read with patience too.

        Raises:
            DataError: the example cannot be used, by source and index.
            ReadError: the source cannot be read for the moment, which is no fault of the example.
        """
        encoded = self._read(lambda: self._lay_out(self.source.example(index)), index)

        def patient(arrays: Mapping[str, np.ndarray]) -> Lazy:
            return Lazy(tuple(arrays), lambda name: self._read(partial(arrays.__getitem__, name), index))

        return replace(encoded, media=[replace(medium, arrays=patient(medium.arrays)) for medium in encoded.media])

    def measure(self, index: int) -> Taken:
        """What one example takes of a row, from its text and the sizes of its media; raises what `encode` does."""
        if self.decodes:
            encoded = self.encode(index)
            for medium in encoded.media:
                dict(medium.arrays)  # some are decoded only when they are read
        else:
            draws = self.processor.layout.needs_sizes
            encoded = self._read(lambda: self._lay_out(without_pixels(self.source.example(index), draws)), index)
        return Taken(encoded.length, encoded.slots, encoded.dropped_turns)

    def key(self) -> str:
        """A name that differs wherever measured lengths would."""
        settings = [self.processor.fingerprint(), self.length, self.layout, self.captions, self.decodes]
        told = json.dumps([_MEASURING, self.source.fingerprint(), *settings])
        return hashlib.sha256(told.encode()).hexdigest()[:24]

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


def without_pixels(example: Example, draws: bool = True) -> Example:
    """The example with the sizes of its images and frames in their place.

    Args:
        draws: also of images that have to be drawn for it; else these stay as they are.

    Raises:
        DataError: see `image_size`.
    """
    return replace(example, messages=tuple(_sized_message(message, draws) for message in example.messages))


def _sized_message(message: Message, draws: bool) -> Message:
    if isinstance(message.content, str):
        return message
    return replace(message, content=tuple(_sized(part, draws) for part in message.parts))


def _sized(part: Part, draws: bool) -> Part:
    if isinstance(part, Image):
        drawn = isinstance(part.source, Drawn) and part.source.size is None
        return part if drawn and not draws else replace(part, source=image_size(part.source))
    if isinstance(part, Video) and not isinstance(part.source, (str, bytes)):
        return replace(part, source=tuple(map(image_size, part.source)))
    return part


def _received(config: Any, source: Source | None, *more: Any) -> SourceEncoder:
    return SourceEncoder(config, config.build() if source is None else source, *more)
