"""Layouts: the preparation of a model's media, their tokens in its text, and the collation of rows."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from typing import Any

import numpy as np

from mllm_jax.data.audio import Samples, as_audio
from mllm_jax.data.batch import BatchSpec
from mllm_jax.data.image_steps import ImageProcessor
from mllm_jax.data.images import Size, as_image
from mllm_jax.data.message import Audio, Image, Part, Video
from mllm_jax.data.pixels import require_call
from mllm_jax.data.processing.frames import ARRAY, FrameTokens, fitted
from mllm_jax.data.processing.media import TEXT, Collated, Lazy, Media, Row, collate_tiles
from mllm_jax.data.processing.video import frame_times, frames_of
from mllm_jax.data.video import FIVE_FRAMES, FrameSampling, FrameTimes
from mllm_jax.errors import ConfigError, DataError


class Layout:
    """The conversion of a model's media to rows; each named model has its own.

    Attributes:
        image_token, video_token, audio_token: the id that the chat template writes for one image, video or sound; None:
            the model reads none.
        inserts_images: prompts have no position for an image, so `arrange` inserts the placeholder.
        instruction_length: the most tokens of an instruction that the projector reads in training; 0: it reads none.
        keeps_text: a special token that a message spells stays text.
        needs_sizes: the positions and slots of an image depend on its size.
        flattens: the chat template takes content only as one text, in which media are tokens.
        unit: the content of a slot: "image" (a whole medium), "tile" or "patch".
        image_processor, frames: of images, and of frames of videos if that differs; None: no `ImageProcessor`.
        sampling: the choice of frames of a video's file.
        needs_times: the positions of a video depend on the times of its frames.
        one_placeholder: all media of a text have the placeholder of images, which the chat template writes.
    """

    image_token: int | None = None
    video_token: int | None = None
    audio_token: int | None = None
    inserts_images: bool = False
    instruction_length: int = 0
    keeps_text: bool = False
    needs_sizes: bool = True
    flattens: bool = False
    unit: str = "image"
    image_processor: ImageProcessor | None = None
    frames: ImageProcessor | None = None
    sampling: FrameSampling = FIVE_FRAMES
    needs_times: bool = False
    one_placeholder: bool = False

    @property
    def placeholders(self) -> dict[str, int]:
        """The placeholder ids of media in a text, by modality."""
        tokens = {"image": self.image_token, "video": self.video_token, "audio": self.audio_token}
        return {kind: token for kind, token in tokens.items() if token is not None}

    def fingerprint(self) -> str:
        """Returns a text that differs if the rows of two layouts for one model would."""
        return repr([self.image_processor, self.frames, self.sampling])

    def image(self, image: np.ndarray) -> Media:
        """Prepares a decoded image uint8[H, W, 3]."""
        raise DataError("an image", "text: the model reads no images", "leave it out")

    def images(self, images: Sequence[np.ndarray]) -> list[Media]:
        """Prepares the images of one text; some models prepare a single image differently."""
        return [self.image(image) for image in images]

    def video(self, frames: np.ndarray, times: FrameTimes) -> Media:
        """Prepares uint8[F, H, W, 3], the frames for the model, which are shown at these times."""
        raise DataError(f"a video of {len(frames)} frames", "images: the model reads no video", "leave it out")

    def audio(self, samples: np.ndarray) -> Media:
        """Prepares the samples float32[n] of a sound."""
        raise DataError("a sound", "media of another kind: the model hears nothing", "leave it out")

    def sized(self, size: Size) -> Media:
        """Returns the result of `image` for an image of a size, without its arrays.

        The default prepares a black image.
        """
        return _without_arrays(self.image(np.zeros((*size, 3), np.uint8)))

    def all_sized(self, sizes: Sequence[Size]) -> list[Media]:
        """Returns the result of `images` for images of these sizes, without their arrays."""
        return [self.sized(size) for size in sizes]

    def sized_video(self, size: Size, times: FrameTimes) -> Media:
        """Returns the result of `video` for frames of a size, without its arrays; the default prepares black frames."""
        return _without_arrays(self.video(np.zeros((len(times.seconds), *size, 3), np.uint8), times))

    def sized_audio(self, length: int) -> Media:
        """Returns the result of `audio` for that many samples, without its arrays; the default prepares silence."""
        return _without_arrays(self.audio(np.zeros(length, np.float32)))

    def prepare(self, parts: Sequence[Part]) -> list[Media]:
        """Prepares the media of one text, in order; raises the same as `prepare_all`."""
        return self.prepare_all([parts])[0]

    def prepare_all(self, rows: Sequence[Sequence[Part]]) -> list[list[Media]]:
        """Prepares the media of several texts. If all sources of a text are a `Size` or `Samples`, it decodes and makes no
        arrays.

        Raises:
            DataError: see `as_image` and `as_audio`; or a text, or all texts, have too many pixels, or frames differ in
                size, or a video is given with sound to a model that hears none.
        """
        _require_silent(rows)
        prepared, pixels = [], 0
        for parts in rows:
            if (sizes := _sizes(parts)) is not None:
                prepared.append(self._from_sizes(parts, sizes))
                continue
            decoded = _decoded(parts, self.sampling)
            seen = [each for each in decoded if not isinstance(each[0], Audio)]
            pixels += sum(self._pixels(part, [frame.shape[:2] for frame in frames]) for part, frames, _ in seen)
            require_call(pixels, "prepared images and frames")
            images = iter(self.images([frames[0] for part, frames, _ in seen if isinstance(part, Image)]))
            prepared.append([self._medium(part, images, *shown) for part, *shown in decoded])
        return prepared

    def _medium(self, part: Part, images: Iterator[Media], shown: Any, times: FrameTimes | None) -> Media:
        """Prepares one decoded medium; of images, the next of those that are prepared already."""
        if isinstance(part, Audio):
            return self.audio(shown)
        return next(images) if isinstance(part, Image) else self._video(shown, times)

    def _from_sizes(self, parts: Sequence[Part], sizes: Sequence[Sequence[Size]]) -> list[Media]:
        """Returns the media of one text from the sizes of its images and frames."""
        require_call(sum(math.prod(size) for each in sizes for size in each), "images and frames of one text")
        known = list(zip(parts, sizes, strict=True))
        pixels = [self._pixels(part, each) for part, each in known if not isinstance(part, Audio)]
        require_call(sum(pixels), "prepared images and frames")
        images = iter(self.all_sized([each[0] for part, each in known if isinstance(part, Image)]))
        return [self._sized_medium(part, images, each) for part, each in known]

    def _sized_medium(self, part: Part, images: Iterator[Media], sizes: Sequence[Size]) -> Media:
        if isinstance(part, Audio):
            return self.sized_audio(part.source)
        return next(images) if isinstance(part, Image) else self.sized_video(_only(sizes), frame_times(part))

    def _video(self, frames: Sequence[np.ndarray], times: FrameTimes) -> Media:
        _only([frame.shape for frame in frames])
        return self.video(np.stack(frames), times)

    def _pixels(self, part: Part, sizes: Sequence[Size]) -> int:
        """Returns the number of pixels of an image or of a video's frames after preparation."""
        if isinstance(part, Image):
            return sum(self.image_processor.pixels(*size) for size in sizes) if self.image_processor else 0
        reader = self.frames or self.image_processor
        return sum(math.prod(reader.output_size(*size)) for size in sizes) if reader else 0

    def arrange(self, ids: list[int], media: int) -> list[int]:
        """Returns the ids of a text with a placeholder for each of `media` media; here the text must have them.

        Models whose prompts have no position for the image insert it.
        """
        return ids

    def without_names(self, ids: Sequence[int]) -> list[int]:
        """Removes the names of images, for models whose texts have names after placeholders."""
        return list(ids)

    def collate(self, rows: Sequence[Sequence[Media]], slots: Mapping[str, int] | None = None) -> Collated:
        """Collates the media of a batch as arrays with one shape for every row; none if the model reads no media."""
        return Collated({}, [[] for _ in rows])

    def spec(self, spec: BatchSpec) -> BatchSpec:
        """Returns a batch's spec with the dtype of the folder's processor for media: bytes, or floats."""
        return spec

    def instruction(self, text: str, bounded: bool) -> np.ndarray:
        """Returns the ids int[n] of one text for the projector: none if `instruction_length` is 0.

        Args:
            bounded: refuse more than `instruction_length` ids.
        """
        return np.zeros(0, np.int32)

    def positions(self, row: Row, media: Sequence[Media]) -> np.ndarray:
        """Returns the positions int[n] of a row's tokens, or int[n, 3] for M-RoPE."""
        return np.arange(len(row.tokens), dtype=np.int32)


class TextLayout(Layout):
    """The layout of a language model, which reads only text."""

    flattens = True

    def prepare_all(self, rows: Sequence[Sequence[Part]]) -> list[list[Media]]:
        if media := [part for parts in rows for part in parts]:
            raise DataError(
                f"{len(media)} {type(media[0]).__name__.lower()}(s) for a language model",
                "text: it reads nothing else",
                "leave them out, or take a model that reads them",
            )
        return [[] for _ in rows]


class TileLayout(Layout):
    """Images as tiles of one size, each with `tokens_a_tile` media tokens."""

    tokens_a_tile: int

    @cached_property
    def _blank(self) -> Mapping[str, np.ndarray]:
        return dict(self.image(np.zeros((32, 32, 3), np.uint8)).arrays)

    def collate(self, rows: Sequence[Sequence[Media]], slots: Mapping[str, int] | None = None) -> Collated:
        count = None if slots is None else slots.get("image", 0)
        collated = collate_tiles(rows, self.tokens_a_tile, count, self.unit)
        if count and not collated.arrays:
            # Batches with and without images have the same shapes, and so one compiled program.
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
    """The layout of a model that a config composes: images resized to the encoder's size, one tile each.

    Args:
        side: of the images that the encoder reads.
        media_tokens: of one image.
        image_token: the placeholder of an image, or of another medium.
        words: ids before each media token, such as those of "top left", "top right"; empty: none.
        video: the conversion of videos; None: the model reads none.
        modalities: those that the model reads, in the order of its branches.

    Raises:
        ConfigError: the numbers of words and media tokens differ.
    """

    keeps_text = True
    needs_sizes = False
    one_placeholder = True

    def __init__(
        self,
        side: int,
        media_tokens: int,
        image_token: int,
        words: Sequence[Sequence[int]] = (),
        flattens: bool = False,
        video: FrameTokens | None = None,
        modalities: Sequence[str] = ("image",),
    ):
        if words and len(words) != media_tokens:
            raise ConfigError(
                f"words for {len(words)} media tokens of an image, which has {media_tokens}",
                "words before each",
                "change tokenizer.places, or leave it out",
            )
        self.side, self.tokens_a_tile, self.image_token, self.flattens = side, media_tokens, image_token, flattens
        self.frame_tokens, self.modalities = video, tuple(modalities)
        if video is not None:
            self.sampling, self.needs_times = video.sampling, bool(video.time)
        tokens, places = [], []
        for number in range(media_tokens):
            before = list(words[number]) if words else []
            tokens += [*before, image_token]
            places += [TEXT] * len(before) + [number]
        self._tokens, self._places = np.asarray(tokens), np.asarray(places)

    @property
    def placeholders(self) -> dict[str, int]:
        return dict.fromkeys(self.modalities, self.image_token)

    def fingerprint(self) -> str:
        video = self.frame_tokens
        read = [] if video is None else [video.side, video.tokens, video.sampling, video.time]
        return repr([self.side, self._tokens.tolist(), *read])

    def prepare_all(self, rows: Sequence[Sequence[Part]]) -> list[list[Media]]:
        """Prepares images and videos that are decoded when their arrays are read: the row does not depend on sizes."""
        _require_silent(rows)
        return [[self._prepared(part) for part in parts] for parts in rows]

    def _prepared(self, part: Part) -> Media:
        kind = type(part).__name__.lower()
        if kind not in self.modalities:
            known = " and ".join(f"{modality}s" for modality in self.modalities)
            raise DataError(f"a {type(part).__name__}", f"{known}: the model reads nothing else", "leave it out")
        if kind == "video":
            return self.frame_tokens.media(part, self.image_token)
        return self._media(lambda source=part.source: as_image(source))

    def image(self, image: np.ndarray) -> Media:
        return self._media(lambda: image)

    def _media(self, read: Callable[[], np.ndarray]) -> Media:
        images = Lazy(("images",), lambda _: fitted(read(), self.side)[None])
        return Media(images, self._tokens, self._places, count=1)

    def collate(self, rows: Sequence[Sequence[Media]], slots: Mapping[str, int] | None = None) -> Collated:
        if self.modalities == ("image",):
            return super().collate(rows, slots)
        arrays, first, before = {}, [[0] * len(row) for row in rows], 0
        for modality in self.modalities:
            tokens, blank = self._kinds[modality]
            own = [[(i, m) for i, m in enumerate(row) if m.modality == modality] for row in rows]
            count = None if slots is None else slots.get(modality, 0)
            found = collate_tiles([[m for _, m in row] for row in own], tokens, count, "tile", modality)
            arrays |= found.arrays
            if count and not found.arrays:
                arrays |= {n: np.zeros((len(rows), count, *tile.shape), tile.dtype) for n, tile in blank.items()}
            for starts, row, mine in zip(first, own, found.first, strict=True):
                for (i, _), start in zip(row, mine, strict=True):
                    starts[i] = before + start
            before += found.newline  # the media tokens of each branch follow those of the branches before it
        return Collated(arrays, first, before)

    @cached_property
    def _kinds(self) -> dict[str, tuple[int, dict[str, np.ndarray]]]:
        """The media tokens of a slot, and its arrays, by modality."""
        kinds = {"image": (self.tokens_a_tile, {"images": np.zeros((self.side, self.side, 3), np.uint8)})}
        if (video := self.frame_tokens) is not None:
            kinds["video"] = video.tokens, {ARRAY: np.zeros((video.side, video.side, 3), np.uint8)}
        return kinds


def _sizes(parts: Sequence[Part]) -> list[Sequence[Size]] | None:
    """Returns the sizes of each medium's frames (an image is one, a sound has none); None if there are no media, or not
    only sizes."""
    sources = [[part.source] if isinstance(part, Image) else part.source for part in parts]
    sources = [() if isinstance(source, Samples) else source for source in sources]
    given = [isinstance(each, (list, tuple)) and all(isinstance(frame, Size) for frame in each) for each in sources]
    return sources if given and all(given) else None


def _require_silent(rows: Sequence[Sequence[Part]]) -> None:
    """Raises DataError: a video is given with its sound."""
    if any(isinstance(part, Video) and part.use_audio_in_video for parts in rows for part in parts):
        raise DataError(
            "a video with use_audio_in_video", "a video alone: the model does not hear its sound", "leave it out"
        )


def _only(sizes: Sequence[tuple[int, ...]]) -> tuple[int, ...]:
    """Returns the size of a video's frames. Raises DataError: they differ."""
    if len(set(sizes)) != 1:
        raise DataError(f"a video of {len(sizes)} frames", "frames of one size", "resize them")
    return sizes[0]


def _without_arrays(media: Media) -> Media:
    return replace(media, arrays={}, count=media.slots)


def _decoded(
    parts: Sequence[Part], sampling: FrameSampling
) -> list[tuple[Part, Sequence[np.ndarray] | np.ndarray, FrameTimes | None]]:
    """Decodes the media of one text, with the times of frames; an image is one frame without a time. A sound's samples
    take the place of frames.

    Raises:
        DataError: see `as_image`, `read_video` and `as_audio`, or too many pixels.
    """
    media, pixels = [], 0

    def counted(frame: np.ndarray) -> np.ndarray:
        nonlocal pixels
        pixels += math.prod(frame.shape[:2])
        require_call(pixels, "images and frames of one text")
        return frame

    for part in parts:
        if isinstance(part, Image):
            media.append((part, [counted(as_image(part.source))], None))
        elif isinstance(part, Video):
            media.append((part, *frames_of(part, sampling, counted)))
        else:
            media.append((part, as_audio(part), None))
    return media
