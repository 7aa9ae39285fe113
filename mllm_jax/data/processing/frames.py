"""Videos of composed models: sampled frames, each encoded as an image, with or without its time in the text."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from mllm_jax.data.message import Video
from mllm_jax.data.processing.composed import fitted
from mllm_jax.data.processing.media import TEXT, Lazy, PreparedMedia
from mllm_jax.data.processing.video import frame_times, frames_of, sampling_of
from mllm_jax.data.video import FIVE_FRAMES, FrameSampling, FrameTimes, measure_video
from mllm_jax.errors import ConfigError

ARRAY = "video_images"  # in a batch


@dataclass(frozen=True)
class FrameTokens:
    """The conversion of a video to media tokens.

    Attributes:
        side: of the frames that the encoder reads.
        tokens: the number of media tokens of one frame.
        sampling: of the frames of a file; of frames that are given, all are shown.
        time: the text before the tokens of each frame, with its seconds, such as "{:.1f} s"; "": no text.
        words: a text's ids; needed for `time`.

    Raises:
        ConfigError: `time` is no format of one number.
    """

    side: int
    tokens: int
    sampling: FrameSampling = FIVE_FRAMES
    time: str = ""
    words: Callable[[str], Sequence[int]] | None = None

    unit = "frame"

    def __post_init__(self):
        try:
            right = not self.time or self.time.format(1.0) != self.time.format(2.5)
        except (ValueError, IndexError, KeyError, AttributeError):
            right = False
        if not right:
            raise ConfigError(f"a frame's time as {self.time!r}", 'a format of the seconds, "{:.1f} s"', "change it")

    def media(self, part: Video, token: int) -> PreparedMedia:
        """Returns a video, whose frames are decoded when they are read.

        Args:
            token: the id at the positions of media tokens.

        Raises:
            DataError: a file that cannot be read, if the number or the times of its frames depend on it.
        """
        before = [self._ids(seconds) for seconds in self._times(part)]
        tokens, places = [], []
        for number, ids in enumerate(before):
            tokens += [*ids, *[token] * self.tokens]
            places += [*[TEXT] * len(ids), *range(number * self.tokens, (number + 1) * self.tokens)]
        arrays = Lazy((ARRAY,), lambda _: np.stack(frames_of(part, self.sampling, self.fitted)[0]))
        return PreparedMedia(arrays, np.asarray(tokens), np.asarray(places), count=len(before), modality="video")

    def _times(self, part: Video) -> Sequence[float]:
        """Returns the seconds of each frame; for a fixed number of frames without times in the text, only as many."""
        if not part.is_file:
            return frame_times(part).seconds.tolist()
        sampling = sampling_of(part, self.sampling)
        if self.time or sampling.num_frames is None:
            times: FrameTimes = measure_video(part.source, sampling, exact=bool(self.time))[1]
            return times.seconds.tolist()
        return [0.0] * sampling.count(0, 1.0)

    def _ids(self, seconds: float) -> Sequence[int]:
        return self.words(self.time.format(seconds)) if self.time else ()

    def fitted(self, image: np.ndarray) -> np.ndarray:
        """Returns uint8[side, side, 3]."""
        return fitted(image, self.side)

    @property
    def blank(self) -> Mapping[str, np.ndarray]:
        return {ARRAY: np.zeros((self.side, self.side, 3), np.uint8)}

    def fingerprint(self) -> str:
        return repr([self.side, self.tokens, self.sampling, self.time])
