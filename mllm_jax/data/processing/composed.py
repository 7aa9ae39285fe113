"""The layout of a model that a config composes: a conversion of media to media tokens for each of its branches."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Protocol

import numpy as np

from mllm_jax.data.images import as_image, resize
from mllm_jax.data.message import Image, Part
from mllm_jax.data.processing.layouts import Layout
from mllm_jax.data.processing.media import TEXT, Collated, Lazy, PreparedMedia, collate_tiles
from mllm_jax.data.processing.signals import Produced, SignalTokens
from mllm_jax.errors import ConfigError, DataError


class Conversion(Protocol):
    """The conversion of the media of one modality.

    Attributes:
        tokens: the number of media tokens of one slot.
        unit: the content of a slot, for messages.
    """

    tokens: int
    unit: str

    @property
    def blank(self) -> Mapping[str, np.ndarray]:
        """The arrays of an empty slot by their names in a batch."""
        ...

    def media(self, part: Any, token: int) -> PreparedMedia:
        """Returns a medium, which is decoded when its arrays are read.

        Args:
            token: the id at the positions of media tokens.
        """
        ...

    def fingerprint(self) -> str:
        """Returns a text that differs if the rows would."""
        ...


@dataclass(frozen=True)
class ImageTokens:
    """Images, resized to the encoder's size.

    Attributes:
        side: of the images that the encoder reads.
        tokens: the number of media tokens of one image.
        words: ids before each media token, such as those of "top left", "top right"; empty: none.

    Raises:
        ConfigError: the numbers of words and media tokens differ.
    """

    side: int
    tokens: int
    words: Sequence[Sequence[int]] = ()

    unit = "image"

    def __post_init__(self):
        if self.words and len(self.words) != self.tokens:
            raise ConfigError(
                f"words for {len(self.words)} media tokens of an image, which has {self.tokens}",
                "words before each",
                "change tokenizer.places, or leave it out",
            )

    @property
    def blank(self) -> Mapping[str, np.ndarray]:
        return {"images": np.zeros((self.side, self.side, 3), np.uint8)}

    def media(self, part: Image, token: int) -> PreparedMedia:
        """Implements `Conversion`."""
        return self.read(lambda: as_image(part.source), token)

    def read(self, decode: Callable[[], np.ndarray], token: int) -> PreparedMedia:
        """Returns an image that `decode` returns as uint8[H, W, 3]."""
        images = Lazy(("images",), lambda _: fitted(decode(), self.side)[None])
        tokens, places = [], []
        for number in range(self.tokens):
            before = list(self.words[number]) if self.words else []
            tokens += [*before, token]
            places += [TEXT] * len(before) + [number]
        return PreparedMedia(images, np.asarray(tokens), np.asarray(places), count=1)

    def fingerprint(self) -> str:
        return repr([self.side, self.tokens, [list(ids) for ids in self.words]])


def fitted(image: np.ndarray, side: int) -> np.ndarray:
    """Returns an image as uint8[side, side, 3]."""
    return image if image.shape[:2] == (side, side) else resize(image, side)


def _kind(part: Part) -> str:
    """Returns the modality of a medium."""
    return type(part).__name__.lower()


class ComposedLayout(Layout):
    """The layout of a composed model, whose rows do not depend on the sizes of images.

    Args:
        conversions: by modality, in the order of the model's branches, which is that of their media tokens in a row.
        placeholder: the id that stands for a medium of any kind in a text.
        produced: by modality, the media that the model produces.
    """

    keeps_text = True
    needs_sizes = False
    one_placeholder = True

    def __init__(
        self,
        conversions: Mapping[str, Conversion],
        placeholder: int,
        flattens: bool = False,
        produced: Mapping[str, SignalTokens] = {},  # noqa: B006
    ):
        self.produced = dict(produced)
        self.conversions, self.image_token, self.flattens = dict(conversions), placeholder, flattens
        self.unit = "image" if list(conversions) == ["image"] else "slot"
        if (video := self.conversions.get("video")) is not None:
            self.sampling, self.needs_times = video.sampling, bool(video.time)

    @property
    def placeholders(self) -> dict[str, int]:
        return dict.fromkeys([*self.conversions, *self.produced], self.image_token)

    def fingerprint(self) -> str:
        found = [(modality, each.fingerprint()) for modality, each in self._all.items()]
        return repr([self.image_token, *found])

    @property
    def _all(self) -> dict[str, Conversion]:
        """The conversions by the names of their slots; those of produced media come last."""
        return self.conversions | {f"{modality}_targets": each for modality, each in self.produced.items()}

    def answered(self, part: Part, learned: bool = True) -> Any:
        """Returns a medium of an answer, marked if the model produces media of its kind."""
        return Produced(part, learned) if _kind(part) in self.produced else part

    def prepare_all(self, rows: Sequence[Sequence[Part]]) -> list[list[PreparedMedia]]:
        """Prepares media; raises the same as the conversions, and DataError for a medium of another kind."""
        self.require_silent(rows)
        return [[self._prepared(part) for part in parts] for parts in rows]

    def _prepared(self, part: Part | Produced) -> PreparedMedia:
        if isinstance(part, Produced):
            return self.produced[_kind(part.part)].media(part.part, self.image_token, learned=part.learned)
        kind = _kind(part)
        if kind not in self.conversions:
            known = " and ".join(f"{modality}s" for modality in self.conversions)
            given = f"a medium of type {type(part).__name__}"
            raise DataError(given, f"{known}: the model reads nothing else", "leave it out")
        return self.conversions[kind].media(part, self.image_token)

    def image(self, image: np.ndarray) -> PreparedMedia:
        return self.conversions["image"].read(lambda: image, self.image_token)

    @cached_property
    def _blank(self) -> dict[str, Mapping[str, np.ndarray]]:
        return {modality: each.blank for modality, each in self._all.items()}

    def collate(self, rows: Sequence[Sequence[PreparedMedia]], slots: Mapping[str, int] | None = None) -> Collated:
        arrays, first, before = {}, [[0] * len(row) for row in rows], 0
        for modality, each in self._all.items():
            own = [[(i, m) for i, m in enumerate(row) if m.modality == modality] for row in rows]
            count = None if slots is None else slots.get(modality, 0)
            found = collate_tiles([[m for _, m in row] for row in own], each.tokens, count, each.unit, modality)
            arrays |= found.arrays
            if count and not found.arrays:
                # Batches with and without media have the same shapes, and so one compiled program.
                blank = self._blank[modality].items()
                arrays |= {name: np.zeros((len(rows), count, *slot.shape), slot.dtype) for name, slot in blank}
            for starts, row, mine in zip(first, own, found.first, strict=True):
                for (i, _), start in zip(row, mine, strict=True):
                    starts[i] = before + start
            if count and isinstance(each, SignalTokens):
                arrays[f"{each.modality}_empty"] = np.tile(each.empty, (len(rows), 1))
            before += found.newline  # the media tokens of each branch follow those of the branches before it
        return Collated(arrays, first, before)
