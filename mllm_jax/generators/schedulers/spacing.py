"""The timesteps and noise levels that a sampler visits (table 2 of arXiv 2305.08891, and k-diffusion's schedules)."""

from __future__ import annotations

import numpy as np

SPACINGS = ("leading", "linspace", "trailing")


def discrete(spacing: str, train: int, steps: int, offset: int) -> np.ndarray:
    """Returns integer timesteps from high to low, int64 [steps], of `train` timesteps in training."""
    if spacing == "linspace":
        return np.linspace(0, train - 1, steps).round()[::-1].astype(np.int64)
    if spacing == "leading":
        return (np.arange(steps) * (train // steps))[::-1].astype(np.int64) + offset
    return trailing(train, train / steps, steps).astype(np.int64)


def continuous(spacing: str, train: int, steps: int, offset: int) -> np.ndarray:
    """Returns timesteps from high to low, float32 [steps], for schedulers that interpolate noise levels."""
    if spacing == "linspace":
        return np.linspace(0, train - 1, steps, dtype=np.float32)[::-1].copy()
    return discrete(spacing, train, steps, offset).astype(np.float32)


def trailing(last: int, ratio: float, steps: int) -> np.ndarray:
    """Returns every `ratio`-th timestep from the last one.

    Rounding may add one at -1 (for 61 of 1,000, for example), which diffusers keeps; it is left out here.
    """
    return np.arange(last, 0, -ratio)[:steps].round() - 1


def sigmas_of(alphas_cumprod: np.ndarray) -> np.ndarray:
    """Returns the noise's standard deviation beside a unit sample, of each timestep in training."""
    return np.sqrt((1 - alphas_cumprod) / alphas_cumprod)


def karras(highest: float, lowest: float, steps: int, rho: float = 7.0) -> np.ndarray:
    """Returns the noise levels of Karras et al. (arXiv 2206.00364), from high to low."""
    low, high = lowest ** (1 / rho), highest ** (1 / rho)
    return (high + np.linspace(0, 1, steps) * (low - high)) ** rho


def exponential(highest: float, lowest: float, steps: int) -> np.ndarray:
    """Returns noise levels whose logarithms are evenly spaced."""
    return np.exp(np.linspace(np.log(highest), np.log(lowest), steps))


def beta(highest: float, lowest: float, steps: int) -> np.ndarray:
    """Returns noise levels at the quantiles of a beta distribution (arXiv 2407.12173)."""
    import scipy.stats

    return lowest + scipy.stats.beta.ppf(1 - np.linspace(0, 1, steps), 0.6, 0.6) * (highest - lowest)


def timesteps_of(sigmas: np.ndarray, log_sigmas: np.ndarray) -> np.ndarray:
    """Returns the timesteps of noise levels, by linear interpolation between the logarithms of training's levels."""
    levels = np.log(np.maximum(sigmas, 1e-10))
    low_index = np.cumsum(levels - log_sigmas[:, None] >= 0, axis=0).argmax(axis=0).clip(max=len(log_sigmas) - 2)
    low, high = log_sigmas[low_index], log_sigmas[low_index + 1]
    weight = np.clip((low - levels) / (low - high), 0, 1)
    return (1 - weight) * low_index + weight * (low_index + 1)
