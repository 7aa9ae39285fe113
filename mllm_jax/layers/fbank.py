"""Kaldi's log-mel filterbank, as `torchaudio.compliance.kaldi.fbank` computes it without dither."""

from __future__ import annotations

import math
from functools import lru_cache
from typing import TypeVar

import jax
import jax.numpy as jnp
import numpy as np

Count = TypeVar("Count", int, np.ndarray)

RATE = 16_000  # samples a second
FRAME, SHIFT = 400, 160  # samples of a frame, and between the starts of two: 25 and 10 ms
FFT = 512  # FRAME rounded up to a power of 2
LOWEST = 20.0  # Hz, the lower end of the first triangle; the last one ends at RATE / 2
PRE_EMPHASIS = 0.97
FLOOR = float(np.finfo(np.float32).eps)  # the smallest energy of which the logarithm is computed


def num_frames(samples: Count) -> Count:
    """Returns the number of whole frames in n samples, for an int or an integer array."""
    frames = 1 + (samples - FRAME) // SHIFT
    return frames * (frames > 0)


def fbank(waveform: jax.Array, num_mel: int = 128) -> jax.Array:
    """Computes the logarithms of mel energies, in float32.

    Kaldi reads 16-bit samples: multiply a waveform in [-1, 1] by 2^15. Each frame loses its mean, is filtered by
    x[i] - 0.97 x[i - 1], and is multiplied by Povey's window. Samples after the last whole frame are not read.

    Args:
        waveform: float[..., samples] at 16 kHz.
        num_mel: number of triangles on the mel scale.

    Returns:
        float32[..., num_frames(samples), num_mel]
    """
    x = _frames(waveform.astype(jnp.float32))
    x = x - x.mean(axis=-1, keepdims=True)
    x = x - PRE_EMPHASIS * jnp.concatenate([x[..., :1], x[..., :-1]], axis=-1)
    spectrum = jnp.fft.rfft(x * _window(), n=FFT)
    power = jnp.square(spectrum.real) + jnp.square(spectrum.imag)  # of the absolute value, silence has no gradient
    energy = jnp.matmul(power, _triangles(num_mel), precision=jax.lax.Precision.HIGHEST)
    return jnp.log(jnp.maximum(energy, FLOOR))


def _frames(waveform: jax.Array) -> jax.Array:
    """Cuts float[..., N] into overlapping frames float[..., F, FRAME], as strided parts of blocks: no gather."""
    block = math.gcd(FRAME, SHIFT)
    count, step = num_frames(waveform.shape[-1]), SHIFT // block
    whole = waveform.shape[-1] // block
    blocks = waveform[..., : whole * block].reshape(*waveform.shape[:-1], whole, block)
    parts = [blocks[..., first : first + count * step : step, :][..., :count, :] for first in range(FRAME // block)]
    return jnp.concatenate(parts, axis=-1)


@lru_cache
def _window() -> np.ndarray:
    """Returns Povey's window, float32[FRAME]: Hann's to the power of 0.85."""
    hann = 0.5 - 0.5 * np.cos(2 * np.pi * np.arange(FRAME) / (FRAME - 1))
    return (hann**0.85).astype(np.float32)


@lru_cache
def _triangles(num_mel: int) -> np.ndarray:
    """Returns the weights of frequencies in mel bins, float32[FFT / 2 + 1, num_mel]; RATE / 2 itself has none.

    The triangles are straight on the mel scale. With many bins, some at the lower end contain no frequency.
    """
    mel = _mel(np.arange(FFT // 2 + 1) * RATE / FFT)[:, None]
    low, high = _mel(np.array([LOWEST, RATE / 2]))
    width = (high - low) / (num_mel + 1)
    left = low + width * np.arange(num_mel)
    weights = np.maximum(0.0, np.minimum(mel - left, left + 2 * width - mel) / width)
    weights[-1] = 0.0
    return weights.astype(np.float32)


def _mel(hertz: np.ndarray) -> np.ndarray:
    return 1127.0 * np.log(1.0 + hertz / 700.0)
