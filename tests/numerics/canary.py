"""A sum that jaxlib 0.10.2 computes wrongly on CPUs; needs only jax and NumPy, and runs as a script."""

from __future__ import annotations

import jax
import numpy as np

ROWS = (32_769, 40_000, 65_537)
WIDTH = 3


def wrong_rows(rows: int) -> int:
    """Returns how many of `rows` float32 results differ from NumPy's in float64 by more than rounding."""
    rng = np.random.default_rng(0)
    matrix, x = (rng.standard_normal(shape).astype(np.float32) for shape in ((WIDTH, WIDTH), (rows, WIDTH)))
    found = np.asarray(jax.jit(jax.vmap(lambda row: ((matrix @ row) ** 2).sum()))(x))
    wanted = np.square(x.astype(np.float64) @ matrix.T.astype(np.float64)).sum(axis=1)
    return int((np.abs(found - wanted) > 1e-5 * (1 + wanted)).sum())


if __name__ == "__main__":
    print(*map(wrong_rows, ROWS))
