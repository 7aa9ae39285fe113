"""Layouts: the preparation of a model's media, their tokens in its text, and the collation of rows."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from typing import Any

import numpy as np

from mllm_jax.data.batch import BatchSpec
from mllm_jax.data.image_steps import ImageProcessor
from mllm_jax.data.images import Size, as_image
from mllm_jax.data.message import Image, Part, Video
from mllm_jax.data.pixels import require_call
from mllm_jax.data.processing.media import Collated, PreparedMedia, Row, collate_tiles
from mllm_jax.data.processing.video import frame_times, frames_of
from mllm_jax.data.video import FIVE_FRAMES, FrameSampling, FrameTimes
from mllm_jax.errors import DataError


class Layout:
    """The conversion of a model's media to rows; each named model has its own.

    Attributes:
        image_token, video_token: the id that the chat template writes for one image or video; None: the model reads
            none.
        inserts_images: prompts have no position for an image, so `arrange` inserts the placeholder.
        instruction_length: the most tokens of an instruction that the projector reads in training; 0: it reads none.
        keeps_text: a special token that a message spells stays text.
        needs_sizes: the positions and slots of an image depend on its size.
        flattens: the chat template takes content only as one text, in which media are tokens.
        unit: the content of a slot: "image" (a whole medium), "tile" or "patch".
        image_processor, frames: of images, and of frames of videos if that differs; None: no `ImageProcessor`.
        sampling: the choice of frames of a video's file.
        needs_times: the positions of a video depend on the times of its frames.
        hears_videos: the model also hears the sound of a video if asked to.
        one_placeholder: all media of a text have the placeholder of images, which the chat template writes.
        template: the chat template of a folder without one; None: such a folder has none.
    """

    image_token: int | None = None
    video_token: int | None = None
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
    hears_videos: bool = False
    one_placeholder: bool = False
    template: str | None = None

    @property
    def placeholders(self) -> dict[str, int]:
        """The placeholder ids of media in a text, by modality."""
        tokens = {"image": self.image_token, "video": self.video_token}
        return {kind: token for kind, token in tokens.items() if token is not None}

    def fingerprint(self) -> str:
        """Returns a text that differs if the rows of two layouts for one model would."""
        return repr([self.image_processor, self.frames, self.sampling])

    def image(self, image: np.ndarray) -> PreparedMedia:
        """Prepares a decoded image uint8[H, W, 3]."""
        raise DataError("an image", "text: the model reads no images", "leave it out")

    def images(self, images: Sequence[np.ndarray]) -> list[PreparedMedia]:
        """Prepares the images of one text; some models prepare a single image differently."""
        return [self.image(image) for image in images]

    def video(self, frames: np.ndarray, times: FrameTimes) -> PreparedMedia:
        """Prepares uint8[F, H, W, 3], the frames for the model, which are shown at these times."""
        raise DataError(f"a video of {len(frames)} frames", "images: the model reads no video", "leave it out")

    def sized(self, size: Size) -> PreparedMedia:
        """Returns the result of `image` for an image of a size, without its arrays.

        The default prepares a black image.
        """
        return _without_arrays(self.image(np.zeros((*size, 3), np.uint8)))

    def all_sized(self, sizes: Sequence[Size]) -> list[PreparedMedia]:
        """Returns the result of `images` for images of these sizes, without their arrays."""
        return [self.sized(size) for size in sizes]

    def sized_video(self, size: Size, times: FrameTimes) -> PreparedMedia:
        """Returns the result of `video` for frames of a size, without its arrays; the default prepares black frames."""
        return _without_arrays(self.video(np.zeros((len(times.seconds), *size, 3), np.uint8), times))

    def answered(self, part: Part, learned: bool = True) -> Any:
        """Returns a medium of an answer as `prepare` takes it; models that produce none read it like a question's.

        Args:
            learned: whether the model learns from it; False: it is part of a prompt.
        """
        return part

    def prepare(self, parts: Sequence[Part]) -> list[PreparedMedia]:
        """Prepares the media of one text, in order; raises the same as `prepare_all`."""
        return self.prepare_all([parts])[0]

    def prepare_all(self, rows: Sequence[Sequence[Part]]) -> list[list[PreparedMedia]]:
        """Prepares the media of several texts. If all sources of a text are a `Size`, it decodes and makes no arrays.

        Raises:
            DataError: see `as_image` and `require_silent`; or a text, or all texts, have too many pixels, or frames
                differ in size.
        """
        self.require_silent(rows)
        prepared, pixels = [], 0
        for parts in rows:
            if (sizes := _sizes(parts)) is not None:
                prepared.append(self._from_sizes(parts, sizes))
                continue
            decoded = _decoded(parts, self.sampling)
            pixels += sum(self._pixels(part, [frame.shape[:2] for frame in frames]) for part, frames, _ in decoded)
            require_call(pixels, "prepared images and frames")
            images = iter(self.images([frames[0] for part, frames, _ in decoded if isinstance(part, Image)]))
            prepared.append(
                [next(images) if isinstance(part, Image) else self._video(*shown) for part, *shown in decoded]
            )
        return prepared

    def _from_sizes(self, parts: Sequence[Part], sizes: Sequence[Sequence[Size]]) -> list[PreparedMedia]:
        """Returns the media of one text from the sizes of its images and frames."""
        require_call(sum(math.prod(size) for each in sizes for size in each), "images and frames of one text")
        require_call(sum(map(self._pixels, parts, sizes)), "prepared images and frames")
        known = list(zip(parts, sizes, strict=True))
        images = iter(self.all_sized([each[0] for part, each in known if isinstance(part, Image)]))
        return [
            next(images) if isinstance(part, Image) else self.sized_video(_only(each), frame_times(part))
            for part, each in known
        ]

    def require_silent(self, rows: Sequence[Sequence[Part]]) -> None:
        """Raises DataError: a model that does not hear videos is given one with `use_audio_in_video`."""
        heard = (part for parts in rows for part in parts if isinstance(part, Video) and part.use_audio_in_video)
        if not self.hears_videos and any(heard):
            raise DataError(
                "a video with use_audio_in_video", "a video alone: the model does not hear its sound", "leave it out"
            )

    def _video(self, frames: Sequence[np.ndarray], times: FrameTimes) -> PreparedMedia:
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

    def collate(self, rows: Sequence[Sequence[PreparedMedia]], slots: Mapping[str, int] | None = None) -> Collated:
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

    def positions(self, row: Row, media: Sequence[PreparedMedia]) -> np.ndarray:
        """Returns the positions int[n] of a row's tokens, or int[n, 3] for M-RoPE."""
        return np.arange(len(row.tokens), dtype=np.int32)


class TextLayout(Layout):
    """The layout of a language model, which reads only text."""

    flattens = True

    def prepare_all(self, rows: Sequence[Sequence[Part]]) -> list[list[PreparedMedia]]:
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

    def collate(self, rows: Sequence[Sequence[PreparedMedia]], slots: Mapping[str, int] | None = None) -> Collated:
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


def _sizes(parts: Sequence[Part]) -> list[Sequence[Size]] | None:
    """Returns the sizes of each medium's frames (an image is one); None if there are no media, or not only sizes."""
    sources = [[part.source] if isinstance(part, Image) else part.source for part in parts]
    given = [isinstance(each, (list, tuple)) and all(isinstance(frame, Size) for frame in each) for each in sources]
    return sources if given and all(given) else None


def _only(sizes: Sequence[tuple[int, ...]]) -> tuple[int, ...]:
    """Returns the size of a video's frames. Raises DataError: they differ."""
    if len(set(sizes)) != 1:
        raise DataError(f"a video of {len(sizes)} frames", "frames of one size", "resize them")
    return sizes[0]


def _without_arrays(media: PreparedMedia) -> PreparedMedia:
    return replace(media, arrays={}, count=media.slots)


def _decoded(
    parts: Sequence[Part], sampling: FrameSampling
) -> list[tuple[Part, Sequence[np.ndarray], FrameTimes | None]]:
    """Decodes the media of one text, with the times of frames; an image is one frame without a time.

    Raises:
        DataError: see `as_image` and `read_video`, or too many pixels.
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
            raise DataError(f"a medium of type {type(part).__name__}", "images or videos", "take a model that reads it")
    return media
