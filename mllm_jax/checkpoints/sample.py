"""The arguments with which `init` creates every parameter, for each kind of module that several families share."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp


def batch_sample(config: Any) -> tuple:
    """A batch, for a whole model that makes one itself."""
    return (config.batch_spec().empty(),)


def token_sample(config: Any) -> tuple:
    """One token, int32[1, 1], for a language model or a text encoder."""
    return (jnp.zeros((1, 1), jnp.int32),)


def image_sample(config: Any) -> tuple:
    """One image of the encoder's size, float32[1, side, side, channels]."""
    return (jnp.zeros((1, config.image_size, config.image_size, config.num_channels)),)
