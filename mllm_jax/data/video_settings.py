"""The settings of transformers' video processors: the choice of frames of a file, and the frames' size."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from mllm_jax.data.image_processors import TYPE_OPTIONS, image_processor, settings
from mllm_jax.data.image_steps import ImageProcessor
from mllm_jax.data.video import FrameSampling
from mllm_jax.errors import ConfigError, DataError

QWEN2, QWEN3 = "Qwen2VLVideoProcessor", "Qwen3VLVideoProcessor"
_FILES = (("processor_config.json", "video_processor"), ("video_preprocessor_config.json", None))
_COUNTS = ("num_frames", "min_frames", "max_frames")


def read_sampling(folder: str | Path, usual: FrameSampling) -> FrameSampling:
    """Returns the sampling of a folder's video processor: what its settings say, and else the usual one's.

    Raises:
        ConfigError: a number that is not positive.
    """
    values, path = settings(folder, _FILES) or ({}, "")
    if not isinstance(values, Mapping):
        raise ConfigError(f"{path} with {type(values).__name__}", "a JSON object", "fetch the file again")
    read = {name: values[name] for name in (*_COUNTS, "fps") if values.get(name) is not None}
    for name, value in read.items():
        kinds = (int,) if name in _COUNTS else (int, float)
        if type(value) not in kinds or not 0 < value < math.inf:
            raise ConfigError(f"{path}: {name}={value!r:.100}", "a positive number", "correct it")
    if "num_frames" in read:
        read["fps"] = None
    elif "fps" in read:
        read["num_frames"] = None
    shift = values.get("initial_shift")
    if shift is not None and not isinstance(shift, bool):
        raise ConfigError(f"{path}: initial_shift={shift!r:.100}", "true or false", "choose the frames yourself")
    if shift is not None:
        read["position"] = "middle" if shift else "start"
    return replace(usual, **read)


def read_frames(folder: str | Path, kind: str, images: ImageProcessor) -> ImageProcessor:
    """Returns the processor of a Qwen-VL's frames: that of `images` if the folder has no settings of videos.

    transformers resizes frames with torchvision: about one byte in 300 differs by one from Pillow's result here.

    Raises:
        ConfigError: see `read_image_processor`.
    """
    found = settings(folder, _FILES)
    if found is None:
        return images
    values, path = found
    if isinstance(values, Mapping):
        values = {name: value for name, value in values.items() if name not in TYPE_OPTIONS} | {TYPE_OPTIONS[0]: kind}
    return image_processor(values, path)


def for_video(processor: ImageProcessor, frames: int, size: tuple[int, int]) -> ImageProcessor:
    """Returns the processor of the frames of one video: Qwen3-VL's range is of the pixels of all frames together."""
    if processor.kind != QWEN3 or processor.pixel_range is None:
        return processor
    step, factor = processor.temporal_patch_size, processor.patch_size * processor.merge_size
    return replace(processor, pixel_range=None, size=_video_size(frames, size, step, factor, processor.pixel_range))


def _video_size(
    frames: int, size: tuple[int, int], step: int, factor: int, pixel_range: tuple[int, int]
) -> tuple[int, int]:
    """Returns the sides of each frame, multiples of `factor`, so that the number of pixels of all is in the range.

    Args:
        step: frames of one patch in time, to which their number is rounded.

    Raises:
        DataError: no pixels, or one side more than 200 times the other.
    """
    height, width = size
    if min(size) < 1 or max(size) > 200 * min(size):
        raise DataError(
            f"frames of {height} x {width} pixels", "sides whose ratio is at most 200", "crop them, or leave them out"
        )
    if min(size) < factor:
        scale = max(factor / height, factor / width)
        height, width = int(height * scale), int(width * scale)
    frames = max(frames, step)
    (least, most), total = pixel_range, round(frames / step) * step
    high, wide = round(height / factor) * factor, round(width / factor) * factor
    if total * high * wide > most:
        shrink = math.sqrt(frames * height * width / most)
        return tuple(max(factor, math.floor(side / shrink / factor) * factor) for side in (height, width))
    if total * high * wide < least:
        grow = math.sqrt(least / (frames * height * width))
        return tuple(math.ceil(side * grow / factor) * factor for side in (height, width))
    return high, wide
