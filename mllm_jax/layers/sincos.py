"""Fixed positions of a square grid: sines and cosines of its columns and rows."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np


def sincos_positions(side: int, width: int, step: float = 1.0) -> jax.Array:
    """Returns float32[side^2, width]: sines and cosines, of the column in the first half, of the row in the second.

    Args:
        width: a multiple of 4.
        step: distance of neighbours of the grid.
    """
    frequencies = (1.0 / 10_000 ** (np.arange(width // 4) / np.float32(width / 4))).astype(np.float32)
    angles = step * np.arange(side, dtype=np.float32)[:, None] * frequencies
    line = jnp.asarray(np.concatenate([np.sin(angles), np.cos(angles)], axis=1), jnp.float32)
    # Broadcast by JAX: a table of millions of positions is abstract where shapes alone are computed.
    columns, rows = (jnp.broadcast_to(each, (side, side, width // 2)) for each in (line[None], line[:, None]))
    return jnp.concatenate([columns, rows], axis=-1).reshape(side**2, width)
