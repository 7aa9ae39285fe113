"""Normalisation of pixels for encoders."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp


def normalise_pixels(pixels, encoder: Any) -> jax.Array:
    """Normalises uint8[..., 3] to float32[..., 3] by the `image_mean` and `image_std` of an encoder's config."""
    mean, std = (jnp.asarray(x, jnp.float32) for x in (encoder.image_mean, encoder.image_std))
    return (pixels.astype(jnp.float32) / 255.0 - mean) / std
