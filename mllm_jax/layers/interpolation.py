"""Bicubic and bilinear interpolation of a square table of vectors, to resize position embeddings to other grids."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
from einops import rearrange


def bicubic_grid(table: jax.Array, height: int, width: int, antialias: bool = False) -> jax.Array:
    """Resizes a table [side^2, E] to one grid: [height * width, E]; see `cubic_weights`."""
    side = math.isqrt(table.shape[0])
    if (height, width) == (side, side):
        return table
    rows, columns = (cubic_weights(jnp.arange(n), jnp.array(n), side, antialias) for n in (height, width))
    table = rearrange(table.astype(jnp.float32), "(r c) e -> r c e", r=side)
    # In full precision even if matrices are multiplied in less: this runs once a batch and costs little.
    resized = jnp.einsum("hr,wc,rce->hwe", rows, columns, table, precision=jax.lax.Precision.HIGHEST)
    return rearrange(resized, "h w e -> (h w) e")


def bicubic_packed(table: jax.Array, coordinates: jax.Array, grids: jax.Array, antialias: bool = False) -> jax.Array:
    """Does the same for patches of images that differ in size: int[B, N, 2] each -> [B, N, E]."""
    side = math.isqrt(table.shape[0])
    rows, columns = (cubic_weights(coordinates[..., i], grids[..., i], side, antialias) for i in (0, 1))
    weights = rearrange(rows[..., :, None] * columns[..., None, :], "b n r c -> b n (r c)")
    return jnp.einsum("bns,se->bne", weights, table)


def bilinear_packed(table: jax.Array, coordinates: jax.Array, grids: jax.Array) -> jax.Array:
    """Stretches a table [side^2, E] over each patch's image, corner on corner ("align_corners" is True).

    Coordinates are kept as integers and remainders, so that no rounding moves a patch to another cell of the table.

    Args:
        coordinates, grids: int[B, N, 2].

    Returns:
        float32[B, N, E].
    """
    side = math.isqrt(table.shape[0])
    steps = jnp.maximum(grids - 1, 1)
    low = coordinates * (side - 1) // steps
    part = (coordinates * (side - 1) - low * steps).astype(jnp.float32) / steps
    taps = [(low, 1 - part), (jnp.minimum(low + 1, side - 1), part)]
    total = jnp.zeros((*coordinates.shape[:2], table.shape[1]), jnp.float32)
    for row, row_weight in taps:
        for column, column_weight in taps:
            vectors = jnp.take(table, row[..., 0] * side + column[..., 1], axis=0, mode="clip")
            total = total + vectors * (row_weight[..., 0] * column_weight[..., 1])[..., None]
    return total


def cubic_weights(index: jax.Array, count: jax.Array, size: int, antialias: bool = False) -> jax.Array:
    """Returns the weight of each of `size` samples at point `index` of `count` points over the same length.

    Points and samples are the centres of equal cells ("align_corners" is False). The product of a row's and a column's
    weights is bicubic interpolation (Keys, 1981).

    Args:
        index, count: int[...], of shapes that broadcast; `count` may differ by point.
        antialias: whether to use a wider kernel that leaves no sample out if there are fewer points than samples. The
            kernels also differ at the edges and in the parameter (-0.5 with, -0.75 without), as in PyTorch's
            `interpolate`.

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
    # Samples beyond the edge take the edge's value.
    hits = jnp.clip(taps, 0, size - 1)[..., None] == samples
    return jnp.einsum("...t,...ts->...s", weights, hits.astype(jnp.float32))


def _cubic(x: jax.Array, a: float) -> jax.Array:
    """Computes Keys' kernel: 1 at 0, 0 from distance 2 on."""
    x = jnp.abs(x)
    near = ((a + 2) * x - (a + 3)) * x * x + 1
    far = ((a * x - 5 * a) * x + 8 * a) * x - 4 * a
    return jnp.where(x < 1, near, jnp.where(x < 2, far, 0.0))
