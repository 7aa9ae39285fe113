"""The sample and the noise that a model's output means, and the limits of a predicted sample."""

from __future__ import annotations

import jax
import jax.numpy as jnp

PREDICTIONS = ("epsilon", "v_prediction", "sample")


def to_sample(kind: str, output: jax.Array, noisy: jax.Array, alpha: jax.Array, sigma: jax.Array) -> jax.Array:
    """Returns the predicted sample, of noisy = alpha * sample + sigma * noise."""
    if kind == "epsilon":
        return (noisy - sigma * output) / alpha
    return output if kind == "sample" else alpha * noisy - sigma * output


def to_noise(kind: str, output: jax.Array, noisy: jax.Array, alpha: jax.Array, sigma: jax.Array) -> jax.Array:
    """Returns the predicted noise, of noisy = alpha * sample + sigma * noise."""
    if kind == "sample":
        return (noisy - alpha * output) / sigma
    return output if kind == "epsilon" else alpha * output + sigma * noisy


def threshold(sample: jax.Array, ratio: float, most: float) -> jax.Array:
    """Clips each sample of a batch [B, ...] at a quantile of its magnitudes (1 to `most`) and divides by it.

    This is the dynamic thresholding of Imagen (arXiv 2205.11487).
    """
    limit = jnp.quantile(jnp.abs(sample).reshape(sample.shape[0], -1), ratio, axis=1).clip(1, most)
    limit = limit.reshape(-1, *(1,) * (sample.ndim - 1))
    return sample.clip(-limit, limit) / limit
