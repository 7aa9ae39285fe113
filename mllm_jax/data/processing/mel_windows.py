"""Log-mel features of sound of any length, read forwards in windows: a few windows are in memory at a time."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import chain

import numpy as np

from mllm_jax.data.audio import Source, audio_blocks
from mllm_jax.data.processing.audio import LogMel
from mllm_jax.errors import DataError

QUIET = 1.0  # of the features: 40 dB below the loudest value of the sound
FLOOR = -0.25  # of the features: quieter than any speech, such as digital silence


class MelWindows:
    """The features of one sound, equal to those of transformers' `WhisperFeatureExtractor`.

    A sound of at most `mel.chunk_length` seconds is padded with silence to that. A longer one is read twice: the
    features depend on its loudest value, and damaged sound is refused before any of it is transcribed.

    Attributes:
        frames: number of all features, those of padding included.
        content: number of features of the sound itself.
        seconds: duration of the sound.
    """

    def __init__(self, source: Source, mel: LogMel):
        self._mel, first = mel, []
        blocks = audio_blocks(source, mel.chunk_length, mel.rate)
        for block in blocks:
            first.append(block)
            if len(first) == 2:
                break
        self._start, self._done = 0, 0
        if len(first) == 1:
            samples = first[0]
            self._held = mel([samples])[mel.name][0]
            self._peak = self._held.max()
            self.frames, self.content = self._held.shape[1], mel.steps(len(samples))
            self._blocks: Iterator[np.ndarray] = iter(())
        else:
            samples, self._largest, self.frames = _Counted(chain(first, blocks)), -np.inf, 0
            for spectrogram in mel.spectrogram(samples):
                self._largest = max(self._largest, spectrogram.max())
                self.frames += spectrogram.shape[1]
            self.content, self._peak = self.frames, (self._largest + 4.0) / 4.0
            self._held = np.zeros((mel.feature_size, 0), np.float32)
            self._blocks = mel.spectrogram(audio_blocks(source, mel.chunk_length, mel.rate))
        self.seconds = len(samples) / mel.rate

    def window(self, start: int, length: int) -> np.ndarray:
        """Returns features float32[feature_size, length] from frame `start` on, zeros after the last one.

        Raises:
            DataError: `start` is less than that of an earlier window, which is not in memory any more.
        """
        if start < self._start:
            raise DataError(
                f"features from frame {start}, after those from {self._start}", "frames in order", "read again"
            )
        while self._start + self._held.shape[1] < start + length:
            spectrogram = next(self._blocks, None)
            if spectrogram is None:
                break
            scaled = self._mel.scaled(spectrogram, self._largest)
            keep = min(start - self._start, self._held.shape[1])
            self._held, self._start = np.concatenate([self._held[:, keep:], scaled], axis=1), self._start + keep
        found = self._held[:, start - self._start :][:, :length]
        return np.pad(found, [(0, 0), (0, length - found.shape[1])])

    def loud(self, start: int, length: int) -> np.ndarray:
        """Returns bool[length]: True for frames of the sound that are not silent.

        A frame is silent if its loudest band is 40 dB below the sound's loudest band, or at the level of digital
        silence.
        """
        found = self.window(start, length)
        of_content = np.arange(start, start + length) < self.content
        return (found.max(axis=0) > max(self._peak - QUIET, FLOOR)) & of_content


class _Counted:
    """Pieces of sound, and the number of samples that have been read."""

    def __init__(self, pieces: Iterator[np.ndarray]):
        self._pieces, self._length = pieces, 0

    def __iter__(self) -> Iterator[np.ndarray]:
        for piece in self._pieces:
            self._length += len(piece)
            yield piece

    def __len__(self) -> int:
        return self._length
