"""Media as generators learn them: a function for each modality, from the generator's config and a message's part."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from mllm_jax.data.audio import as_audio
from mllm_jax.data.images import as_image
from mllm_jax.data.message import Audio, Image, Video
from mllm_jax.data.processing.composed import fitted
from mllm_jax.data.processing.video import frames_of
from mllm_jax.data.video import FrameSampling
from mllm_jax.errors import DataError


def image_target(generator: Any, part: Image) -> np.ndarray:
    """Returns uint8[side, side, 3]."""
    return fitted(as_image(part.source), generator.target_shape[0])


def video_target(generator: Any, part: Video) -> np.ndarray:
    """Returns uint8[frames, side, side, 3]: frames at even distances.

    Raises:
        DataError: a list of another number of frames, or a file that cannot be read.
    """
    count, side = generator.target_shape[:2]
    frames, _ = frames_of(part, FrameSampling(num_frames=count), lambda frame: fitted(frame, side))
    if len(frames) != count:
        raise DataError(
            f"a video to produce of {len(frames)} frames",
            f"{count}, as its generator makes",
            "give that many, or a file",
        )
    return np.stack(frames)


def audio_target(generator: Any, part: Audio) -> np.ndarray:
    """Returns the log-mel spectrogram float32[frames, bins] of a sound's beginning, with silence after its end."""
    spectrogram = generator.spectrogram
    return spectrogram(as_audio(part, spectrogram.rate), generator.target_shape[0])


TARGETS: Mapping[str, Callable[[Any, Any], np.ndarray]] = {
    "image": image_target,
    "video": video_target,
    "audio": audio_target,
}
