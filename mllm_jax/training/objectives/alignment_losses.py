"""The distance of an output projector's condition to that of the generator's own, frozen text encoder."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from mllm_jax.errors import ConfigError

KINDS = ("l2", "mse")


def condition_loss(
    predicted: jax.Array, target: jax.Array, kind: str = "l2", mask: jax.Array | None = None
) -> jax.Array:
    """Computes the mean distance of a predicted condition to its target, in float32.

    Args:
        predicted, target: [..., n, d].
        kind: "l2", the mean over vectors of the Euclidean distance (NExT-GPT, arXiv 2309.05519, whose code names it
            mse_loss), or "mse", the mean over all numbers of the squared difference.
        mask: bool[..., n], False at vectors that do not count; None: all count.

    Returns:
        float32: 0 without a vector that counts. The gradient of the distance of equal vectors is 0.

    Raises:
        ConfigError: another kind.
    """
    if kind not in KINDS:
        raise ConfigError(f"condition loss {kind!r}", f"one of {', '.join(KINDS)}", "change kind")
    difference = predicted.astype(jnp.float32) - target.astype(jnp.float32)
    mask = jnp.ones(difference.shape[:-1], bool) if mask is None else mask.astype(bool)
    # What does not count may be anything, also NaN.
    squares = jnp.square(jnp.where(mask[..., None], difference, 0))
    if kind == "mse":
        each = squares.mean(axis=-1)
    else:
        # The derivative of the root is infinite at 0.
        total = squares.sum(axis=-1)
        each = jnp.where(total > 0, jnp.sqrt(jnp.where(total > 0, total, 1)), 0)
    return each.sum() / jnp.maximum(mask.sum(), 1)
