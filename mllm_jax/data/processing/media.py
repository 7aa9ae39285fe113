"""Prepared images, videos and sounds: the encoder's inputs, and their tokens in the text."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from mllm_jax.data.units import in_words
from mllm_jax.errors import DataError

TEXT, NEWLINE = -1, -2  # values of a place that are not the index of a media token


@dataclass(frozen=True)
class PreparedMedia:
    """One prepared image, video or sound.

    Attributes:
        arrays: the encoder's inputs by their names in a batch: tiles uint8[n, H, W, 3] or patches float32[n, D].
        tokens: int[L], the ids that replace the placeholder in the text.
        places: int[L], or int[L, K] with weights: the image's media token at each position, counted from 0 over its
            tiles or merged patches; TEXT is the id itself, NEWLINE the model's newline vector.
        weights: float[L, K] of the K media tokens whose sum is at a position, or None.
        grid: time, height and width in patches, for packed patches.
        seconds: the duration of one step in time of the grid, in a video.
        count: its slots of a row, if known without reading the arrays.
        modality: the branch of the model that encodes it.
        owners: int[L], for a medium whose tokens include those of the next one in the list: 0 for its own and for text,
            1 for the next one's; None: all are its own.
        inside: its tokens are among those of the medium before it; it has no placeholder in the text.
        carried: float[L], the loss weights of its tokens in an answer; None: they carry no loss.
        signals: int[N], indices among its tokens of those whose hidden states an output projector reads; None: it is
            no medium to produce.
    """

    arrays: Mapping[str, np.ndarray]
    tokens: np.ndarray
    places: np.ndarray
    weights: np.ndarray | None = None
    grid: tuple[int, int, int] | None = None
    seconds: float | None = None
    count: int | None = None
    modality: str = "image"
    owners: np.ndarray | None = None
    inside: bool = False
    carried: np.ndarray | None = None
    signals: np.ndarray | None = None

    @property
    def slots(self) -> int:
        """Its slots of a row: tiles, or patches."""
        return len(next(iter(self.arrays.values()))) if self.count is None else self.count


@dataclass(frozen=True)
class Lazy(Mapping[str, np.ndarray]):
    """Arrays that are made at each read."""

    names: tuple[str, ...]
    read: Callable[[str], np.ndarray]

    def __getitem__(self, name: str) -> np.ndarray:
        if name not in self.names:
            raise KeyError(name)
        return self.read(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self.names)

    def __len__(self) -> int:
        return len(self.names)


@dataclass(frozen=True)
class Collated:
    """The media of a batch.

    Attributes:
        arrays: by their names in the batch; empty if there are no media and no slots.
        first: for each row, the index in the row of each image's first media token.
        newline: the index of the newline vector.
    """

    arrays: dict[str, np.ndarray]
    first: list[list[int]]
    newline: int = 0


@dataclass(frozen=True)
class Row:
    """A text with media tokens at the positions of its images.

    Attributes:
        tokens: int[L].
        places: int[L, K], indices of media tokens in each image, TEXT or NEWLINE.
        weights: float[L, K].
        owners: int[L], the image that a token belongs to; -1 is text.
    """

    tokens: np.ndarray
    places: np.ndarray
    weights: np.ndarray
    owners: np.ndarray

    def media_index(self, first: Sequence[int], newline: int) -> np.ndarray:
        """Returns int[L, K]: indices of media tokens in the row, -1 for text; see `Multimodal.merge`."""
        start = np.asarray([*first, 0], np.int64)[self.owners]  # for text the last one, which is not read
        return np.where(self.places >= 0, self.places + start[:, None], np.where(self.places == NEWLINE, newline, -1))

    def followed_by(self, ids: Sequence[int]) -> Row:
        """Returns the row with more text after it."""
        more = _text(np.asarray(ids, np.int64), self.places.shape[1])
        mine = (self.tokens, self.places, self.weights, self.owners)
        return Row(*(np.concatenate(pair) for pair in zip(mine, more, strict=True)))


def collate_tiles(
    rows: Sequence[Sequence[PreparedMedia]],
    tokens_a_tile: int,
    slots: int | None = None,
    unit: str = "tile",
    modality: str = "image",
) -> Collated:
    """Collates tiles of one size: `images` uint8[B, M, H, W, 3].

    Args:
        tokens_a_tile: media tokens of one tile.
        slots: M; None is the number of the fullest row.
        unit, modality: the name of a tile in a message, and of its branch.

    Raises:
        DataError: a row has more tiles than slots.
    """
    counts = [[m.slots for m in row] for row in rows]
    needed = max((sum(row) for row in counts), default=0)
    slots = needed if slots is None else slots
    if needed > slots:
        raise DataError(
            f"a row with {in_words({modality: needed}, unit)}",
            f"at most {slots:,}",
            "raise `slots`, or give it fewer or smaller images",
        )
    first = [list(np.cumsum([0, *row])[:-1] * tokens_a_tile) for row in counts]
    arrays = {}
    for name in dict.fromkeys(name for row in rows for m in row for name in m.arrays):
        tiles = [[m.arrays[name] for m in row] for row in rows]  # read once: some are drawn at each read
        example = next(each for row in tiles for each in row)
        batch = np.zeros((len(rows), slots, *example.shape[1:]), example.dtype)
        for row, filled in zip(batch, tiles, strict=True):
            if filled:
                row[: sum(map(len, filled))] = np.concatenate(filled)
        arrays[name] = batch
    return Collated(arrays, first, slots * tokens_a_tile)


def lay_out_row(ids: Sequence[int], media: Sequence[PreparedMedia], placeholders: Sequence[int], what: str) -> Row:
    """Replaces the placeholder of each image or video by its tokens.

    Args:
        ids: of the text, with one placeholder for each of `media` that is not inside another, in order.
        placeholders: all placeholder ids of images and videos.
        what: the name of the text in the message.

    Raises:
        DataError: the numbers of placeholders and media differ.
    """
    ids = np.asarray(ids, np.int64)
    where = np.flatnonzero(one_of(ids, placeholders))
    placed = each_placed(media)
    if len(where) != len(placed):
        raise DataError(
            f"{what} with {len(where)} placeholder(s) for media, and {len(placed)} of them",
            "one placeholder for each, in order",
            "give as many media as the text has placeholders, and no placeholder that is meant as text",
        )
    width = max((m.places.shape[1] for m in media if m.places.ndim == 2), default=1)
    pieces, start = [], 0
    for at, (number, m) in zip(where, placed, strict=True):
        pieces += [_text(ids[start:at], width), _medium(m, number, width)]
        start = at + 1
    pieces.append(_text(ids[start:], width))
    return Row(*(np.concatenate(parts) for parts in zip(*pieces, strict=True)))


def each_placed(media: Sequence[PreparedMedia]) -> list[tuple[int, PreparedMedia]]:
    """Returns the index and the medium of each that has a placeholder in the text."""
    return [(number, m) for number, m in enumerate(media) if not m.inside]


def one_of(ids: np.ndarray, tokens: Sequence[int]) -> np.ndarray:
    """Returns bool[n]: True for ids among `tokens`."""
    found = np.zeros(len(ids), bool)
    for token in tokens:
        found |= ids == token
    return found


def _text(ids: np.ndarray, width: int) -> tuple[np.ndarray, ...]:
    places = np.full((len(ids), width), TEXT, np.int64)
    return ids, places, np.zeros(places.shape, np.float32), np.full(len(ids), -1, np.int64)


def _medium(media: PreparedMedia, number: int, width: int) -> tuple[np.ndarray, ...]:
    places = media.places if media.places.ndim == 2 else media.places[:, None]
    weights = np.ones(places.shape, np.float32) if media.weights is None else media.weights
    # Sums of fewer media tokens repeat the first one with weight 0.
    if missing := width - places.shape[1]:
        places = np.concatenate([places, np.repeat(places[:, :1], missing, axis=1)], axis=1)
        weights = np.pad(weights, [(0, 0), (0, missing)])
    owners = np.full(len(places), number, np.int64) + (0 if media.owners is None else media.owners)
    return np.asarray(media.tokens, np.int64), places, weights, owners


@dataclass(frozen=True)
class Encoded:
    """An example as one row or a part of one: its text with media at their positions, and its loss weights.

    Attributes:
        row: the text.
        loss_weights: float32[n], of the target if there is one, else of the text.
        media: its prepared media.
        segments: int[n], from 1: tokens of different segments do not attend to each other; None: one segment.
        dropped_turns: number of turns that did not fit.
        target: int[n], the text of an encoder-decoder's decoder.
        instruction: int[m], read by the projector with the media, in the projector's own ids.
    """

    row: Row
    loss_weights: np.ndarray
    media: Sequence[PreparedMedia] = ()
    segments: np.ndarray | None = None
    dropped_turns: int = 0
    target: np.ndarray | None = None
    instruction: np.ndarray | None = None

    @property
    def tokens(self) -> np.ndarray:
        return self.row.tokens

    @property
    def length(self) -> int:
        """Its positions of a row; for an encoder-decoder, the larger of the two sides."""
        return max(len(self.row.tokens), 0 if self.target is None else len(self.target))

    @property
    def slots(self) -> dict[str, int]:
        """Its media's slots of a row, by modality."""
        counts: Counter[str] = Counter()
        for medium in self.media:
            counts[medium.modality] += medium.slots
        return {modality: count for modality, count in counts.items() if count}
