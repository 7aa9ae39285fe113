"""Fixed positions of a square grid: sines and cosines of its columns and rows."""

from __future__ import annotations

import numpy as np


def sincos_positions(side: int, width: int, step: float = 1.0) -> np.ndarray:
    """Returns float32[side^2, width]: sines and cosines, of the column in the first half, of the row in the second.

    Args:
        width: a multiple of 4.
        step: distance of neighbours of the grid.
    """
    frequencies = (1.0 / 10_000 ** (np.arange(width // 4) / np.float32(width / 4))).astype(np.float32)
    rows, columns = np.divmod(np.arange(side**2, dtype=np.float32), side)
    parts = [f(step * index[:, None] * frequencies) for index in (columns, rows) for f in (np.sin, np.cos)]
    return np.concatenate(parts, axis=1).astype(np.float32)
