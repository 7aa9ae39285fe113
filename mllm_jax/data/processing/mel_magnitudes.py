"""Log-mel spectrograms as generators of sound learn them, which a vocoder or Griffin and Lim's way makes sound of."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from mllm_jax.data.processing.audio import hann_window, mel_filters
from mllm_jax.errors import ConfigError, DataError


@dataclass(frozen=True)
class MelMagnitudes:
    """Natural logarithms of the mel bands of magnitudes; the defaults are AudioLDM's (arXiv 2301.12503, its code).

    Frames are centred, and the sound is mirrored at its ends. The bands are Slaney's, up to 8 kHz.

    Attributes:
        rate: samples a second.
        n_fft: samples of a frame.
        hop: samples from one frame to the next.
        bins: mel bands.
        floor: the least magnitude.
    """

    rate: int = 16_000
    n_fft: int = 1024
    hop: int = 160
    bins: int = 64
    floor: float = 1e-5

    def __post_init__(self):
        if min(self.n_fft, self.hop, self.bins) < 1 or self.hop > self.n_fft or self.rate < 16_000 or self.floor <= 0:
            raise ConfigError(
                f"mel magnitudes of {self}",
                "a hop of 1 to n_fft samples, at least one bin, a rate of at least 16000, and a floor above 0",
                "change them",
            )

    @property
    def filters(self) -> np.ndarray:
        """The weights float64[bins, n_fft // 2 + 1] of the frequencies in each band."""
        return mel_filters(self.n_fft, self.bins, self.rate)

    def __call__(self, samples: np.ndarray, frames: int | None = None) -> np.ndarray:
        """Returns the spectrogram float32[frames, bins] of mono samples float[n].

        Args:
            frames: a longer sound is cut at its end, and a shorter one is followed by silence; None: 1 + n // hop.

        Raises:
            DataError: no samples.
        """
        if not len(samples):
            raise DataError("a sound without samples", "at least one", "leave it out")
        count = 1 + len(samples) // self.hop if frames is None else frames
        samples = samples if frames is None else samples[: count * self.hop]
        length = len(samples) if frames is None else count * self.hop
        padded = np.zeros(max(length, self.n_fft // 2 + 1))  # enough to mirror
        padded[: len(samples)] = samples
        wave = np.pad(padded, self.n_fft // 2, mode="reflect")
        pieces = np.lib.stride_tricks.sliding_window_view(wave, self.n_fft)[:: self.hop][:count]
        magnitudes = np.abs(np.fft.rfft(pieces * hann_window(self.n_fft)))
        return np.log(np.maximum(magnitudes @ self.filters.T, self.floor)).astype(np.float32)
