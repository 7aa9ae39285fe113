"""Pictures and videos on their way into a batch: what the encoder reads, and what stands for them in the text."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from mllm_jax.data.units import in_words
from mllm_jax.errors import DataError

TEXT, NEWLINE = -1, -2  # what a place may be besides the number of a media token


@dataclass(frozen=True)
class Media:
    """One picture or video, prepared.

    Attributes:
        arrays: what the encoder reads, tiles uint8[n, H, W, 3] or patches float32[n, D], by its name in a batch.
        tokens: int[L], the ids that stand in the text instead of the placeholder.
        places: int[L], or int[L, K] with weights: the media token of this picture that stands there, counted from 0
            over its tiles or merged patches; TEXT is the id itself, NEWLINE the model's newline vector.
        weights: float[L, K] of the K media tokens whose sum stands at a place, or None.
        grid: time, height and width in patches, for packed patches.
        seconds: what one step in time of the grid takes, in a video.
        count: slots of a row that it takes, where that is known without reading the arrays.
        modality: the branch of the model that encodes it.
    """

    arrays: Mapping[str, np.ndarray]
    tokens: np.ndarray
    places: np.ndarray
    weights: np.ndarray | None = None
    grid: tuple[int, int, int] | None = None
    seconds: float | None = None
    count: int | None = None
    modality: str = "image"

    @property
    def slots(self) -> int:
        """Slots of a row that it takes: tiles, or patches."""
        return len(next(iter(self.arrays.values()))) if self.count is None else self.count


@dataclass(frozen=True)
class Lazy(Mapping[str, np.ndarray]):
    """Arrays that are made each time that they are read."""

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
        arrays: what the batch holds of them, by name; empty if there are none and no slots were asked for.
        first: of each row the number in the row of each picture's first media token.
        newline: the number of the newline vector.
    """

    arrays: dict[str, np.ndarray]
    first: list[list[int]]
    newline: int = 0


@dataclass(frozen=True)
class Row:
    """A text with media tokens in the places of its pictures.

    Attributes:
        tokens: int[L].
        places: int[L, K], numbers of media tokens in each picture, TEXT or NEWLINE.
        weights: float[L, K].
        owners: int[L], the picture that a token belongs to; -1 is text.
    """

    tokens: np.ndarray
    places: np.ndarray
    weights: np.ndarray
    owners: np.ndarray

    def media_index(self, first: Sequence[int], newline: int) -> np.ndarray:
        """int[L, K]: numbers of media tokens in the row, -1 for text; see `Multimodal.merge`."""
        start = np.asarray([*first, 0], np.int64)[self.owners]  # of text the last one, which is not read
        return np.where(self.places >= 0, self.places + start[:, None], np.where(self.places == NEWLINE, newline, -1))

    def followed_by(self, ids: Sequence[int]) -> Row:
        """The row with more text behind it."""
        more = _text(np.asarray(ids, np.int64), self.places.shape[1])
        mine = (self.tokens, self.places, self.weights, self.owners)
        return Row(*(np.concatenate(pair) for pair in zip(mine, more, strict=True)))


def collate_tiles(
    rows: Sequence[Sequence[Media]], tokens_a_tile: int, slots: int | None = None, unit: str = "tile"
) -> Collated:
    """Tiles of one size, side by side in each row: `images` uint8[B, M, H, W, 3].

    Args:
        tokens_a_tile: media tokens of one tile.
        slots: M; None is as many as the fullest row has.
        unit: what to call a tile in a message.

    Raises:
        DataError: a row with more tiles than slots.
    """
    counts = [[m.slots for m in row] for row in rows]
    needed = max((sum(row) for row in counts), default=0)
    slots = needed if slots is None else slots
    if needed > slots:
        raise DataError(
            f"a row with {in_words({'image': needed}, unit)}",
            f"at most {slots:,}",
            "raise `slots`, or give it fewer or smaller images",
        )
    first = [list(np.cumsum([0, *row])[:-1] * tokens_a_tile) for row in counts]
    arrays = {}
    for name in dict.fromkeys(name for row in rows for m in row for name in m.arrays):
        tiles = [[m.arrays[name] for m in row] for row in rows]  # read once: some are drawn when they are
        example = next(each for row in tiles for each in row)
        batch = np.zeros((len(rows), slots, *example.shape[1:]), example.dtype)
        for row, filled in zip(batch, tiles, strict=True):
            if filled:
                row[: sum(map(len, filled))] = np.concatenate(filled)
        arrays[name] = batch
    return Collated(arrays, first, slots * tokens_a_tile)


def lay_out_row(ids: Sequence[int], media: Sequence[Media], placeholders: Sequence[int], what: str) -> Row:
    """Puts what stands for each picture in the place of its placeholder.

    Args:
        ids: of the text, with one placeholder for each of `media`, in order.
        placeholders: all ids that stand for a picture or video.
        what: the text, for the message.

    Raises:
        DataError: another number of placeholders than of pictures.
    """
    ids = np.asarray(ids, np.int64)
    where = np.flatnonzero(one_of(ids, placeholders))
    if len(where) != len(media):
        raise DataError(
            f"{what} with {len(where)} place(s) for pictures or videos, and {len(media)} of them",
            "one place for each, in their order",
            "give as many pictures as the text has placeholders, and no placeholder that is meant as text",
        )
    width = max((m.places.shape[1] for m in media if m.places.ndim == 2), default=1)
    pieces, start = [], 0
    for number, (at, m) in enumerate(zip(where, media, strict=True)):
        pieces += [_text(ids[start:at], width), _picture(m, number, width)]
        start = at + 1
    pieces.append(_text(ids[start:], width))
    return Row(*(np.concatenate(parts) for parts in zip(*pieces, strict=True)))


def one_of(ids: np.ndarray, tokens: Sequence[int]) -> np.ndarray:
    """bool[n]: which ids are among a few."""
    found = np.zeros(len(ids), bool)
    for token in tokens:
        found |= ids == token
    return found


def _text(ids: np.ndarray, width: int) -> tuple[np.ndarray, ...]:
    places = np.full((len(ids), width), TEXT, np.int64)
    return ids, places, np.zeros(places.shape, np.float32), np.full(len(ids), -1, np.int64)


def _picture(media: Media, number: int, width: int) -> tuple[np.ndarray, ...]:
    places = media.places if media.places.ndim == 2 else media.places[:, None]
    weights = np.ones(places.shape, np.float32) if media.weights is None else media.weights
    # The sum of fewer media tokens than others need: the first one again, with nothing of it.
    if missing := width - places.shape[1]:
        places = np.concatenate([places, np.repeat(places[:, :1], missing, axis=1)], axis=1)
        weights = np.pad(weights, [(0, 0), (0, missing)])
    return np.asarray(media.tokens, np.int64), places, weights, np.full(len(places), number, np.int64)


@dataclass(frozen=True)
class Encoded:
    """An example as one row or a part of one: its text with media in their positions, and what carries loss.

    Attributes:
        row: the text.
        loss_weights: float32[n], of the text or, with a target, of that.
        media: what its media became.
        segments: int[n], from 1: what may not see each other; None: all is one.
        dropped_turns: how many turns did not fit.
        target: of an encoder-decoder, int[n] that its decoder writes.
        instruction: int[m] that the projector reads beside the media, in the projector's own ids.
    """

    row: Row
    loss_weights: np.ndarray
    media: Sequence[Media] = ()
    segments: np.ndarray | None = None
    dropped_turns: int = 0
    target: np.ndarray | None = None
    instruction: np.ndarray | None = None

    @property
    def tokens(self) -> np.ndarray:
        return self.row.tokens

    @property
    def length(self) -> int:
        """Positions of a row that it takes, on the side of an encoder-decoder where it takes more."""
        return max(len(self.row.tokens), 0 if self.target is None else len(self.target))

    @property
    def slots(self) -> dict[str, int]:
        """Slots that its media take in a row, by modality."""
        counts: Counter[str] = Counter()
        for medium in self.media:
            counts[medium.modality] += medium.slots
        return dict(counts)
