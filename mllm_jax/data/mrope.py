"""Positions in three parts, time, height and width (M-RoPE, arXiv 2409.12191, section 2.1), as integers on the host."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from mllm_jax.data.processing.media import Media, Row


def mrope_positions(row: Row, media: Sequence[Media], merge_size: int, tokens_per_second: int | None) -> np.ndarray:
    """int[L, 3]: a text counts all three parts on; a picture's begin where the text before it ended.

    Behind a picture the text goes on by its longer side in media tokens, whatever time a video takes.

    Args:
        merge_size: side of the square of patches that is one media token.
        tokens_per_second: how fast a video's time runs by its own `seconds`; None: one a step.
    """
    positions = np.zeros((len(row.tokens), 3), np.int32)
    here = start = 0
    while here < len(row.tokens):
        owner = row.owners[here]
        stop = here + int(np.argmin(np.append(row.owners[here:] == owner, False)))
        if owner < 0 or not (row.places[here:stop, 0] >= 0).any():
            positions[here:stop] = (start + np.arange(stop - here))[:, None]
            start += stop - here
        else:
            time, height, width = media[owner].grid
            grid = np.indices((time, height // merge_size, width // merge_size)).reshape(3, -1).T
            if tokens_per_second is not None and media[owner].seconds is not None:
                grid[:, 0] = (grid[:, 0] * (tokens_per_second * media[owner].seconds)).astype(np.int64)
            positions[here:stop] = start + grid
            start += max(height, width) // merge_size
        here = stop
    return positions
