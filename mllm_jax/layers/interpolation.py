"""Cubic interpolation as a matrix, so that sizes may differ by place: what resizes position embeddings."""

from __future__ import annotations

import jax
import jax.numpy as jnp


def cubic_weights(index: jax.Array, count: jax.Array, size: int, antialias: bool = False) -> jax.Array:
    """How much each of `size` samples counts at place `index` of `count` places over the same length.

    Places and samples stand in the middle of equal cells ("align_corners" is False). The product of a row's and a
    column's weights is bicubic interpolation (Keys, 1981).

    Args:
        index, count: int[...], alike or broadcast; `count` may differ by place.
        antialias: when there are fewer places than samples, a wider kernel that leaves none out. The kernels differ in
            the edges and in the parameter too (-0.5 with, -0.75 without), as in PyTorch's `interpolate`.

    Returns:
        float32[..., size], which sums to 1.
    """
    scale = size / jnp.asarray(count, jnp.float32)
    centre = (jnp.asarray(index, jnp.float32) + 0.5) * scale - 0.5
    samples = jnp.arange(size, dtype=jnp.float32)
    if antialias:
        weights = _cubic((samples - centre[..., None]) / jnp.maximum(scale, 1.0)[..., None], -0.5)
        return weights / weights.sum(axis=-1, keepdims=True)
    first = jnp.floor(centre) - 1.0
    taps = first[..., None] + jnp.arange(4)
    weights = _cubic(taps - centre[..., None], -0.75)
    # Samples beyond the edge are the edge's.
    hits = jnp.clip(taps, 0, size - 1)[..., None] == samples
    return jnp.einsum("...t,...ts->...s", weights, hits.astype(jnp.float32))


def _cubic(x: jax.Array, a: float) -> jax.Array:
    """Keys' kernel: 1 at 0, 0 from distance 2 on."""
    x = jnp.abs(x)
    near = ((a + 2) * x - (a + 3)) * x * x + 1
    far = ((a * x - 5 * a) * x + 8 * a) * x - 4 * a
    return jnp.where(x < 1, near, jnp.where(x < 2, far, 0.0))
