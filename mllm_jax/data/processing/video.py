"""The frames of a message's video with their times: decoded, or as sizes alone."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np

from mllm_jax.data.images import as_image, image_size
from mllm_jax.data.message import Audio, Part, Video
from mllm_jax.data.video import FrameSampling, FrameTimes, has_sound, measure_video, read_video


def sampling_of(part: Video, usual: FrameSampling) -> FrameSampling:
    """Returns the sampling of a video's file: its own number or rate of frames, or else the model's."""
    if part.num_frames is None and part.fps is None:
        return usual
    return replace(usual, num_frames=part.num_frames, fps=part.fps)


def frame_times(part: Video) -> FrameTimes:
    """Returns the times of frames that are given."""
    return FrameTimes.of(len(part.source), part.fps, part.times)


def frames_of(
    part: Video, usual: FrameSampling, fit: Callable[[np.ndarray], np.ndarray] = lambda frame: frame
) -> tuple[Sequence[np.ndarray], FrameTimes]:
    """Returns the frames uint8[H, W, 3] of a video, each after `fit`, and their times.

    Raises:
        DataError: see `read_video` and `as_image`.
    """
    if part.is_file:
        return read_video(part.source, sampling_of(part, usual), fit)
    return [fit(as_image(frame)) for frame in part.source], frame_times(part)


def with_sound(part: Part) -> Part:
    """Returns a video that is heard too; other media, and videos whose sound is given, as they are."""
    if not isinstance(part, Video) or part.use_audio_in_video:
        return part
    return replace(part, use_audio_in_video=True)


def sound_of(part: Video) -> Audio | None:
    """Returns the sound that the model hears with a video; None: none, or the file has none.

    Raises:
        DataError: see `read_video`.
    """
    asked = part.use_audio_in_video
    if isinstance(asked, Audio):
        return asked
    return Audio(part.source) if asked and has_sound(part.source) else None


def sized_frames(part: Video, usual: FrameSampling, exact: bool) -> Video:
    """Returns a video with the sizes of its frames instead of their pixels.

    Args:
        exact: with the times that `frames_of` would find; if False, those of a file follow from its header.
    """
    if not part.is_file:
        return replace(part, source=tuple(map(image_size, part.source)))
    size, times = measure_video(part.source, sampling_of(part, usual), exact)
    heard = part.use_audio_in_video
    return Video((size,) * len(times.seconds), times=times.seconds, fps=times.fps, use_audio_in_video=heard)
