"""Schedules of the noise's variance in training, in float32 as PyTorch computes them."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np

SCHEDULES = ("linear", "scaled_linear", "squaredcos_cap_v2")


def betas_of(kind: str, start: float, end: float, count: int) -> np.ndarray:
    """Returns the betas of a schedule by its name in diffusers, float32 [count]."""
    if kind == "linear":
        return linspace(start, end, count)
    if kind == "scaled_linear":
        return linspace(start**0.5, end**0.5, count) ** np.float32(2)
    if kind == "sigmoid":
        sigmoid = np.float32(1) / (np.float32(1) + np.exp(-linspace(-6, 6, count)))
        return sigmoid * np.float32(end - start) + np.float32(start)
    return _from_alpha_bar({"squaredcos_cap_v2": _cosine, "laplace": _laplace}[kind], count)


def linspace(start: float, end: float, count: int) -> np.ndarray:
    """Computes `torch.linspace` in float32: each half from its own end."""
    if count == 1:
        return np.array([start], np.float32)
    first, last = np.float32(start), np.float32(end)
    step = (last - first) / np.float32(count - 1)
    index = np.arange(count)
    # In float64, then rounded once: PyTorch's kernel multiplies and adds with one rounding.
    low = first.astype(np.float64) + step.astype(np.float64) * index
    high = last.astype(np.float64) - step.astype(np.float64) * (count - 1 - index)
    return np.where(index < count // 2, low, high).astype(np.float32)


def cumulative(alphas: np.ndarray) -> np.ndarray:
    """Computes `torch.cumprod` of float32 on a CPU, which accumulates in float64."""
    return np.cumprod(alphas.astype(np.float64)).astype(np.float32)


def zero_terminal_snr(betas: np.ndarray) -> np.ndarray:
    """Rescales betas so that nothing of the image is left at the last timestep (arXiv 2305.08891, algorithm 1)."""
    root = np.sqrt(cumulative(np.float32(1) - betas))
    first, last = root[0], root[-1]
    root = (root - last) * (first / (first - last))
    bar = root**2
    return np.float32(1) - np.concatenate([bar[:1], bar[1:] / bar[:-1]])


def _from_alpha_bar(alpha_bar: Callable[[float], float], count: int) -> np.ndarray:
    """Returns the betas, at most 0.999, whose cumulative product follows a function of the time in [0, 1]."""
    times = [i / count for i in range(count + 1)]
    pairs = zip(times, times[1:], strict=False)
    return np.array([min(1 - alpha_bar(after) / alpha_bar(before), 0.999) for before, after in pairs], np.float32)


def _cosine(time: float) -> float:
    return math.cos((time + 0.008) / 1.008 * math.pi / 2) ** 2


def _laplace(time: float) -> float:
    half = -0.5 * math.copysign(1, 0.5 - time) * math.log(1 - 2 * math.fabs(0.5 - time) + 1e-6)
    snr = math.exp(half)
    return math.sqrt(snr / (1 + snr))
