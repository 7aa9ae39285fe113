"""Layouts: how a model's media are prepared, what stands for them in its text, and how rows of them are collated."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import cached_property

import numpy as np

from mllm_jax.data.batch import BatchSpec
from mllm_jax.data.image_steps import ImageProcessor
from mllm_jax.data.images import Size, as_picture, resize
from mllm_jax.data.message import Image, Part, Video
from mllm_jax.data.pixels import require_call
from mllm_jax.data.processing.media import TEXT, Collated, Lazy, Media, Row, collate_tiles
from mllm_jax.errors import ConfigError, DataError


class Layout:
    """How a model's media become rows; a named model has one of its own.

    Attributes:
        image_token, video_token: the id that stands for one image or video in a text, as the chat template writes it;
            None: the model takes none.
        places_pictures: whether prompts name no position for an image, so that `arrange` puts it where it belongs.
        instruction_length: the most tokens that the projector reads of an instruction in training; 0: it reads none.
        keeps_text: whether a special token that a message spells stays text.
        needs_sizes: whether what an image takes of a row depends on its size.
        flattens: whether the chat template takes content as one text only, in which media are tokens.
        unit: what a slot of a row holds: "image" (a whole medium), "tile" or "patch".
        pictures, frames: what prepares images, and frames of videos where that is another; None: no `ImageProcessor`.
    """

    image_token: int | None = None
    video_token: int | None = None
    places_pictures: bool = False
    instruction_length: int = 0
    keeps_text: bool = False
    needs_sizes: bool = True
    flattens: bool = False
    unit: str = "image"
    pictures: ImageProcessor | None = None
    frames: ImageProcessor | None = None

    @property
    def placeholders(self) -> dict[str, int]:
        """The ids that stand for media in a text, by modality."""
        tokens = {"image": self.image_token, "video": self.video_token}
        return {kind: token for kind, token in tokens.items() if token is not None}

    def fingerprint(self) -> str:
        """A text that differs where rows would, of two layouts for one model."""
        return repr([self.pictures, self.frames])

    def image(self, picture: np.ndarray) -> Media:
        """Prepares uint8[H, W, 3] as decoded."""
        raise DataError("an image", "text: the model reads no images", "leave it out")

    def images(self, pictures: Sequence[np.ndarray]) -> list[Media]:
        """Prepares the images of one text; some models prepare a single image differently."""
        return [self.image(picture) for picture in pictures]

    def video(self, frames: np.ndarray) -> Media:
        """Prepares uint8[F, H, W, 3], the frames that the model is to see."""
        raise DataError(f"a video of {len(frames)} frames", "images: the model reads no video", "leave it out")

    def sized(self, size: Size) -> Media:
        """What `image` makes of an image of that size, without its arrays: what it takes of a row.

        A layout that does not say it prepares a black image.
        """
        return _without_arrays(self.image(np.zeros((*size, 3), np.uint8)))

    def all_sized(self, sizes: Sequence[Size]) -> list[Media]:
        """What `images` makes of images of these sizes, without their arrays."""
        return [self.sized(size) for size in sizes]

    def sized_video(self, frames: int, size: Size) -> Media:
        """What `video` makes of frames of that size, without its arrays; a layout that does not say it prepares one."""
        return _without_arrays(self.video(np.zeros((frames, *size, 3), np.uint8)))

    def prepare(self, parts: Sequence[Part]) -> list[Media]:
        """The media of one text, in their order; raises what `prepare_all` does."""
        return self.prepare_all([parts])[0]

    def prepare_all(self, rows: Sequence[Sequence[Part]]) -> list[list[Media]]:
        """The media of several texts. Where all sources of a text are a `Size`, nothing is decoded, and no arrays made.

        Raises:
            DataError: see `as_picture`; too many pixels in a text or in all, or frames of different sizes.
        """
        prepared, pixels = [], 0
        for parts in rows:
            if (sizes := _sizes(parts)) is not None:
                prepared.append(self._from_sizes(parts, sizes))
                continue
            decoded = _decoded(parts)
            pixels += sum(self._pixels(part, [frame.shape[:2] for frame in frames]) for part, frames in decoded)
            require_call(pixels, "prepared images and frames")
            images = iter(self.images([frames[0] for part, frames in decoded if isinstance(part, Image)]))
            prepared.append([next(images) if isinstance(p, Image) else self._video(frames) for p, frames in decoded])
        return prepared

    def _from_sizes(self, parts: Sequence[Part], sizes: Sequence[Sequence[Size]]) -> list[Media]:
        """The media of one text, of whose images and frames only the sizes are known."""
        require_call(sum(math.prod(size) for each in sizes for size in each), "images and frames of one text")
        require_call(sum(map(self._pixels, parts, sizes)), "prepared images and frames")
        known = list(zip(parts, sizes, strict=True))
        images = iter(self.all_sized([each[0] for part, each in known if isinstance(part, Image)]))
        return [
            next(images) if isinstance(part, Image) else self.sized_video(len(each), _only(each))
            for part, each in known
        ]

    def _video(self, frames: list[np.ndarray]) -> Media:
        _only([frame.shape for frame in frames])
        return self.video(np.stack(frames))

    def _pixels(self, part: Part, sizes: Sequence[Size]) -> int:
        """How many pixels will be made of an image or of the frames of a video."""
        if isinstance(part, Image):
            return sum(self.pictures.pixels(*size) for size in sizes) if self.pictures else 0
        reader = self.frames or self.pictures
        return sum(math.prod(reader.output_size(*size)) for size in sizes) if reader else 0

    def arrange(self, ids: list[int], media: int) -> list[int]:
        """The ids of a text that is to have so many media, with a placeholder for each; here they have to be there.

        Models whose prompts name no position for the image put it where it belongs.
        """
        return ids

    def without_names(self, ids: Sequence[int]) -> list[int]:
        """The ids of a text without the names of its images, where the model's texts have any after placeholders."""
        return list(ids)

    def collate(self, rows: Sequence[Sequence[Media]], slots: Mapping[str, int] | None = None) -> Collated:
        """The media of a batch as arrays with one shape for every row; a model that reads none has none."""
        return Collated({}, [[] for _ in rows])

    def spec(self, spec: BatchSpec) -> BatchSpec:
        """A batch's spec with its media as the folder's processor leaves them: bytes, or numbers."""
        return spec

    def instruction(self, text: str, bounded: bool) -> np.ndarray:
        """The ids int[n] that the projector reads of one text: none where `instruction_length` is 0.

        Args:
            bounded: refuse more than `instruction_length` of them.
        """
        return np.zeros(0, np.int32)

    def positions(self, row: Row, media: Sequence[Media]) -> np.ndarray:
        """int[n] of a row's text, or int[n, 3] for M-RoPE; they count the tokens."""
        return np.arange(len(row.tokens), dtype=np.int32)


class TextLayout(Layout):
    """The layout of a language model, which reads text alone."""

    flattens = True

    def prepare_all(self, rows: Sequence[Sequence[Part]]) -> list[list[Media]]:
        if media := [part for parts in rows for part in parts]:
            raise DataError(
                f"{len(media)} {type(media[0]).__name__.lower()}(s) for a language model",
                "text: it reads words only",
                "leave them out, or take a model that reads them",
            )
        return [[] for _ in rows]


class TileLayout(Layout):
    """Images as tiles of one size, each of which takes `tokens_a_tile` media tokens."""

    tokens_a_tile: int

    @cached_property
    def _blank(self) -> Mapping[str, np.ndarray]:
        return dict(self.image(np.zeros((32, 32, 3), np.uint8)).arrays)

    def collate(self, rows: Sequence[Sequence[Media]], slots: Mapping[str, int] | None = None) -> Collated:
        count = None if slots is None else slots.get("image", 0)
        collated = collate_tiles(rows, self.tokens_a_tile, count, self.unit)
        if count and not collated.arrays:
            # Batches without any image keep the shapes of those with some, so that one program serves both.
            made = {n: np.zeros((len(rows), count, *tile.shape[1:]), tile.dtype) for n, tile in self._blank.items()}
            collated = replace(collated, arrays=made)
        return collated

    def spec(self, spec: BatchSpec) -> BatchSpec:
        found = {name: tile for name, tile in self._blank.items() if name in spec}
        return spec | {
            name: replace(spec[name], shape=(*spec[name].shape[:2], *tile.shape[1:]), dtype=str(tile.dtype))
            for name, tile in found.items()
        }


class PlainLayout(TileLayout):
    """The layout of a model that is composed here: images resized to the encoder's size, one tile each.

    Args:
        side: of the images that the encoder reads.
        media_tokens: of one image.
        image_token: the id that stands for an image.
        words: ids before each media token, such as those of "top left", "top right"; empty: nothing stands there.

    Raises:
        ConfigError: words for another number of media tokens.
    """

    keeps_text = True
    needs_sizes = False

    def __init__(
        self,
        side: int,
        media_tokens: int,
        image_token: int,
        words: Sequence[Sequence[int]] = (),
        flattens: bool = False,
    ):
        if words and len(words) != media_tokens:
            raise ConfigError(
                f"words for {len(words)} places of a picture, which takes {media_tokens}",
                "words before each of them",
                "change tokenizer.places, or leave it out",
            )
        self.side, self.tokens_a_tile, self.image_token, self.flattens = side, media_tokens, image_token, flattens
        tokens, places = [], []
        for number in range(media_tokens):
            before = list(words[number]) if words else []
            tokens += [*before, image_token]
            places += [TEXT] * len(before) + [number]
        self._tokens, self._places = np.asarray(tokens), np.asarray(places)

    def fingerprint(self) -> str:
        return repr([self.side, self._tokens.tolist()])

    def prepare_all(self, rows: Sequence[Sequence[Part]]) -> list[list[Media]]:
        """An image is decoded when its arrays are read: its size says nothing about the row."""
        if strange := [part for parts in rows for part in parts if not isinstance(part, Image)]:
            raise DataError(f"a {type(strange[0]).__name__}", "images: the model reads nothing else", "leave it out")
        return [[self._media(lambda source=part.source: as_picture(source)) for part in parts] for parts in rows]

    def image(self, picture: np.ndarray) -> Media:
        return self._media(lambda: picture)

    def _media(self, read: Callable[[], np.ndarray]) -> Media:
        images = Lazy(("images",), lambda _: self._fitted(read())[None])
        return Media(images, self._tokens, self._places, count=1)

    def _fitted(self, picture: np.ndarray) -> np.ndarray:
        return picture if picture.shape[:2] == (self.side, self.side) else resize(picture, self.side)


def _sizes(parts: Sequence[Part]) -> list[Sequence[Size]] | None:
    """Of each medium the sizes of its frames, an image being one; None where more than sizes is given, or nothing."""
    sources = [[part.source] if isinstance(part, Image) else part.source for part in parts]
    given = [isinstance(each, (list, tuple)) and all(isinstance(frame, Size) for frame in each) for each in sources]
    return sources if given and all(given) else None


def _only(sizes: Sequence[tuple[int, ...]]) -> tuple[int, ...]:
    """The one size of a video's frames."""
    if len(set(sizes)) != 1:
        raise DataError(f"a video of {len(sizes)} frames", "frames of one size", "resize them")
    return sizes[0]


def _without_arrays(media: Media) -> Media:
    return replace(media, arrays={}, count=media.slots)


def _decoded(parts: Sequence[Part]) -> list[tuple[Part, list[np.ndarray]]]:
    """The media of one text: an image is one frame. Raises DataError: see `as_picture`, or too many pixels."""
    media, pixels = [], 0
    for part in parts:
        if not isinstance(part, (Image, Video)):
            raise DataError(f"a {type(part).__name__}", "images or videos", "take a model that reads it")
        frames = []
        for frame in [part.source] if isinstance(part, Image) else part.source:
            frames.append(as_picture(frame))
            pixels += math.prod(frames[-1].shape[:2])
            require_call(pixels, "images and frames of one text")
        media.append((part, frames))
    return media
