"""The parts of a diffusion objective: weights by signal-to-noise ratio, the squared error, and dropped conditions."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from mllm_jax.errors import ConfigError

PREDICTIONS = ("epsilon", "v_prediction", "sample")


def signal_to_noise(alphas_cumprod: jax.Array, timesteps: jax.Array) -> jax.Array:
    """Returns the signal-to-noise ratio of noised samples, alpha / (1 - alpha).

    Args:
        alphas_cumprod: float[T], the share of the signal's variance at each timestep.
        timesteps: int[B].

    Returns:
        float32[B].
    """
    alphas = alphas_cumprod.astype(jnp.float32)[timesteps]
    return alphas / (1 - alphas)


def min_snr_weights(snr: jax.Array, gamma: float, prediction: str) -> jax.Array:
    """Returns each sample's weight in the loss by the min-SNR strategy (arXiv 2303.09556, section 3.4).

    The error of the clean sample has the weight min(snr, gamma). In terms of the error of the noise it is divided by
    snr, and of the velocity by snr + 1.

    Args:
        snr: float[B], see `signal_to_noise`; 0 and infinity are allowed.
        gamma: 5 in the paper.
        prediction: that of the network, "epsilon", "v_prediction" or "sample".

    Returns:
        float32[B].

    Raises:
        ConfigError: another prediction, such as a flow's, or a gamma that is not positive.
    """
    if prediction not in PREDICTIONS or not gamma > 0:
        raise ConfigError(
            f"min-SNR weights with gamma {gamma} of a network that predicts {prediction!r}",
            f"a positive gamma, and one of {', '.join(PREDICTIONS)}",
            "change gamma, or leave out the weights",
        )
    snr = snr.astype(jnp.float32)
    if prediction == "sample":
        return jnp.minimum(snr, gamma)
    # min(snr, gamma) / snr, also for snr 0.
    of_noise = jnp.where(snr > gamma, gamma / snr, 1.0)
    if prediction == "epsilon":
        return of_noise
    # snr / (snr + 1), also for an infinite snr.
    return of_noise * jnp.where(snr > 1, 1 / (1 + 1 / snr), snr / (1 + snr))


def diffusion_loss(
    output: jax.Array, target: jax.Array, weights: jax.Array | None = None, mask: jax.Array | None = None
) -> jax.Array:
    """Computes the mean over samples of the weighted mean squared error of each sample, in float32.

    The weight of a sample multiplies its own error: multiplying the mean error of the batch by the mean weight, as
    NExT-GPT's code does, is a different loss.

    Args:
        output, target: [B, ...], the network's output and what it predicts: the noise, the velocity or a flow.
        weights: float[B], such as `min_snr_weights`; None is 1.
        mask: bool[B], False at samples that do not count; or of more leading dimensions of `output`, such as
            bool[B, H, W]: then also the mean in a sample is over what counts. None: all counts.

    Returns:
        float32: 0 without a sample that counts.
    """
    error = output.astype(jnp.float32) - target.astype(jnp.float32)
    mask = jnp.ones(error.shape[:1], bool) if mask is None else mask.astype(bool)
    mask = jnp.broadcast_to(mask.reshape(*mask.shape, *[1] * (error.ndim - mask.ndim)), error.shape)
    inside = tuple(range(1, error.ndim))
    numbers = mask.sum(axis=inside)
    each = jnp.square(jnp.where(mask, error, 0)).sum(axis=inside) / jnp.maximum(numbers, 1)
    if weights is not None:
        each = jnp.where(numbers > 0, each * weights.astype(jnp.float32), 0)
    return each.sum() / jnp.maximum((numbers > 0).sum(), 1)


def drop_condition(key: jax.Array, condition: Any, empty: Any, rate: float) -> Any:
    """Replaces the conditions of some samples by that of no caption, for guidance (arXiv 2207.12598, algorithm 1).

    Args:
        key: random key of the step.
        condition: [B, ...], or a tree of them: all conditions of a sample are dropped together.
        empty: the same without the first dimension, or with a first dimension of 1 or B.
        rate: share of samples, 0.1 as a rule.

    Raises:
        ConfigError: a rate that is no share.
    """
    if not 0 <= rate <= 1:
        raise ConfigError(f"conditions dropped at the rate {rate}", "a share from 0 to 1", "change the rate")
    rows = jax.tree.leaves(condition)[0].shape[0]
    dropped = jax.random.bernoulli(key, rate, (rows,))

    def one(given, none):
        return jnp.where(dropped.reshape(rows, *[1] * (given.ndim - 1)), jnp.asarray(none, given.dtype), given)

    return jax.tree.map(one, condition, empty)
