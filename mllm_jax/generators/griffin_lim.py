"""Griffin and Lim's way from log-mel spectrograms to sound, where no vocoder is trained.

The mel bands are spread over frequencies by the least squares, and the phases that fit best are found by turns between
sound and spectrum (Griffin and Lim 1984), with the momentum of Perraudin et al. 2013. It has no parameters. What the
bands do not hold is lost: it sounds rougher than a trained vocoder.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from flax import linen as nn

from mllm_jax.data.processing.audio import hann_window
from mllm_jax.data.processing.mel_magnitudes import MelMagnitudes
from mllm_jax.layers.compute import WithCompute
from mllm_jax.layers.requirements import Requirements

TINY = 1e-8


@dataclass(frozen=True)
class GriffinLimConfig(WithCompute):
    """The config of the inverse of a spectrogram, in the role of a `VocoderConfig`.

    Attributes:
        spectrogram: what it inverts.
        turns: between sound and spectrum.
        momentum: share of the last change that is added to the next spectrum; 0 is Griffin and Lim's own way.
    """

    spectrogram: MelMagnitudes = MelMagnitudes()
    turns: int = 32
    momentum: float = 0.99

    family = None

    def __post_init__(self):
        require = Requirements("Griffin-Lim", self)
        require(self.turns >= 0, f"turns {self.turns}", "at least 0", "change turns")
        require(0 <= self.momentum < 1, f"momentum {self.momentum}", "from 0 to below 1", "change momentum")
        require(
            self.spectrogram.n_fft % 2 == 0 and self.spectrogram.hop * 2 <= self.spectrogram.n_fft,
            f"hop {self.spectrogram.hop}, n_fft {self.spectrogram.n_fft}",
            "an even n_fft, and frames that overlap by half or more",
            "change them",
        )

    @property
    def num_mel_bins(self) -> int:
        """The number of mel bands of a frame."""
        return self.spectrogram.bins

    @property
    def rate(self) -> int:
        """Samples a second."""
        return self.spectrogram.rate

    @property
    def rates(self) -> tuple[int, ...]:
        """The samples of each frame, as the factors of a vocoder's steps."""
        return (self.spectrogram.hop,)

    def make(self) -> GriffinLim:
        return GriffinLim(self)


class GriffinLim(nn.Module):
    """A module without parameters; see `GriffinLimConfig`."""

    config: GriffinLimConfig

    def __call__(self, spectrogram) -> jax.Array:
        """Maps log-mel frames [B, T, bins] to sounds float32[B, T * hop]."""
        c = self.config
        bands = jnp.exp(spectrogram.astype(jnp.float32))
        spread = jnp.asarray(np.linalg.pinv(c.spectrogram.filters), jnp.float32)
        magnitudes = jnp.maximum(bands @ spread.T, TINY)
        return phases_found(magnitudes, Frames(c.spectrogram.n_fft, c.spectrogram.hop), c.turns, c.momentum)


@dataclass(frozen=True)
class Frames:
    """The frames of a sound, centred, with Hann's window; the sound is mirrored at its ends.

    Attributes:
        size: samples of a frame.
        hop: samples from one frame to the next.
    """

    size: int
    hop: int

    @cached_property
    def window(self) -> np.ndarray:
        return np.float32(hann_window(self.size))

    def spectrum(self, samples) -> jax.Array:
        """Maps float32[B, T * hop] to complex64[B, T, size // 2 + 1]."""
        count, edge = samples.shape[1] // self.hop, self.size // 2
        wave = jnp.pad(samples, ((0, 0), (edge, edge)), mode="reflect")
        where = np.arange(count)[:, None] * self.hop + np.arange(self.size)
        return jnp.fft.rfft(wave[:, where] * self.window)

    def samples(self, spectrum) -> jax.Array:
        """Returns the sound float32[B, T * hop] whose frames are nearest to a spectrum, by the least squares."""
        count, edge = spectrum.shape[1], self.size // 2
        frames = jnp.fft.irfft(spectrum, self.size) * self.window
        total, weight = (self._added(x) for x in (frames, jnp.broadcast_to(self.window**2, (1, *frames.shape[1:]))))
        wave = total / jnp.maximum(weight, 1e-3)  # the last samples are seen by the edge of one frame only
        return wave[:, edge : edge + count * self.hop]

    def _added(self, frames) -> jax.Array:
        """Adds frames [B, T, size] at their places, to [B, at least T * hop + size]."""
        pieces = math.ceil(self.size / self.hop)
        frames = jnp.pad(frames, ((0, 0), (0, 0), (0, pieces * self.hop - self.size)))
        parts = rearrange(frames, "b t (p h) -> p b t h", p=pieces)
        shifted = [jnp.pad(part, ((0, 0), (i, pieces - i), (0, 0))) for i, part in enumerate(parts)]
        return rearrange(sum(shifted), "b t h -> b (t h)")


def phases_found(magnitudes, frames: Frames, turns: int, momentum: float) -> jax.Array:
    """Returns the sound float32[B, T * hop] of magnitudes float32[B, T, size // 2 + 1], from random phases."""

    def turn(carry, _):
        spectrum, last = carry
        fitting = frames.spectrum(frames.samples(spectrum))
        pushed = fitting + momentum * (fitting - last)
        phases = pushed / jnp.maximum(jnp.abs(pushed), TINY)
        return (magnitudes * phases, fitting), None

    # Random phases that are the same for every sound: those of zero are a click in each frame.
    angles = jax.random.uniform(jax.random.key(0), magnitudes.shape[1:], maxval=2 * jnp.pi)
    begun = magnitudes * jnp.exp(1j * angles)
    (spectrum, _), _ = jax.lax.scan(turn, (begun, jnp.zeros_like(begun)), None, length=turns)
    return frames.samples(spectrum)
