"""One recording that is transcribed window by window: where it is, what was said, where the next window begins.

The windows, segments and prompts are those of transformers' Whisper in sequential long form.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from mllm_jax.data.processing.mel_windows import MelWindows
from mllm_jax.generation.transcript import Segment

MARGIN = 0.3  # seconds of silence that a window keeps before speech


@dataclass(frozen=True)
class Piece:
    """The tokens of a segment, and its place in its window.

    Attributes:
        tokens: text and times.
        first: index of the first token among those of the window.
        start, end: positions of the encoder's vectors, from the beginning of the window.
    """

    tokens: tuple[int, ...]
    first: int
    start: int
    end: int


def cut(tokens: Sequence[int], times: int, frames: int) -> tuple[list[Piece], int]:
    """Cuts a window's text at its pairs of times.

    Args:
        tokens: without the end.
        times: the token of the time 0; the tokens from it on are times.
        frames: the features in the window; two are a position.

    Returns:
        The pieces, and the features after which the next window begins: at the last pair, as the text after it is not
        finished, or after the whole window.
    """
    is_time = [token >= times for token in tokens]
    ends = [i for i in range(1, len(tokens)) if is_time[i - 1] and is_time[i]]
    if not ends:
        found = [token - times for token in tokens if token >= times]
        end = found[-1] if found and found[-1] != 0 else frames // 2
        return [Piece(tuple(tokens), 0, 0, end)], frames
    closed = is_time[-2:] == [False, True]  # no speech follows a single time at the end
    if closed:
        ends.append(len(tokens))
    else:
        ends[-1] += 1  # the last piece keeps both times
    pieces, first = [], 0
    for end in ends:
        part = tuple(tokens[first:end])
        last = part[-2] if end == ends[-1] and not closed else part[-1]
        pieces.append(Piece(part, first, part[0] - times, last - times))
        first = end
    return pieces, frames if closed else 2 * (tokens[ends[-1] - 2] - times)


@dataclass
class Recording:
    """The state of one recording.

    Attributes:
        index: its position in the caller's list.
        window_frames: number of features of a window.
        frame_seconds: duration of a feature.
        seek: the feature with which the next window begins.
        timed: its texts have times.
        language, language_probability: see `Transcript`.
        prompt: the tokens of the user's prompt.
        history: the tokens of the prompt and of each segment so far.
        conditioned: the next prompt begins with the history; otherwise with the user's prompt.
        segments: see `Transcript`.
        said: the tokens of all segments.
    """

    index: int
    windows: MelWindows
    window_frames: int
    frame_seconds: float
    seek: int = 0
    timed: bool = False
    language: str | None = None
    language_probability: float | None = None
    prompt: tuple[int, ...] = ()
    history: list[tuple[int, ...]] = field(default_factory=list)
    conditioned: bool = False
    segments: list[Segment] = field(default_factory=list)
    said: list[int] = field(default_factory=list)

    @property
    def offset(self) -> float:
        """Seconds at which the next window begins."""
        return self.seek * self.frame_seconds

    @property
    def done(self) -> bool:
        return self.seek >= self.windows.content

    @property
    def seconds_done(self) -> float:
        """Seconds that have been transcribed."""
        return self.windows.seconds if self.done else self.offset

    @property
    def frames(self) -> int:
        """The features of the next window, without padding to its length."""
        return min(self.windows.frames - self.seek, self.window_frames)

    @property
    def positions(self) -> int:
        """The encoder's vectors of the next window that are of the sound itself."""
        return max(min(self.windows.content - self.seek, self.window_frames) // 2, 1)

    @property
    def features(self) -> np.ndarray:
        """The features float32[mel, T] of the next window."""
        return self.windows.window(self.seek, self.window_frames)

    def skip_silence(self) -> None:
        """Moves the next window to the next sound that is not silent."""
        margin = round(MARGIN / self.frame_seconds)
        while not self.done:
            loud = self.windows.loud(self.seek, self.window_frames)
            if loud.any():
                self.seek += max(int(loud.argmax()) - margin, 0)
                return
            self.seek += self.window_frames

    def before(self, times: int, most: int) -> list[int]:
        """Returns the last tokens of the history, at most `most`, without second times of pairs that end segments."""
        found: list[int] = []
        for tokens in self.history:
            found += tokens[:-1] if len(tokens) > 2 and tokens[-2] >= times else tokens
        return found[-most:]
