"""The time of each token of a text, from the attention to the audio with which the text was written."""

from __future__ import annotations

import numpy as np


def token_positions(attention: np.ndarray, filter_width: int) -> np.ndarray:
    """Returns the position in the audio at which each token ends, as transformers' Whisper does.

    The attention of each head is normalised over the tokens, smoothed over time and averaged over heads; the best
    monotonic path through it assigns positions to tokens.

    Args:
        attention: float[A, n, S], the probabilities of A heads while the decoder reads each of n tokens.
        filter_width: odd, of the median filter over time.

    Returns:
        int[n], increasing.
    """
    attention = np.asarray(attention, np.float32)
    with np.errstate(divide="ignore", invalid="ignore"):
        scores = (attention - attention.mean(axis=1, keepdims=True)) / attention.std(axis=1, keepdims=True)
    scores = median_filter(np.nan_to_num(scores, posinf=0.0, neginf=0.0), filter_width).mean(axis=0)
    tokens, positions = warped(-scores.astype(np.float64))
    return positions[np.diff(tokens, prepend=-1) > 0]


def median_filter(x: np.ndarray, width: int) -> np.ndarray:
    """Returns the median over `width` neighbours along the last axis, which is reflected at its ends."""
    edge = width // 2
    if x.shape[-1] <= edge:
        return x
    padded = np.pad(x, [(0, 0)] * (x.ndim - 1) + [(edge, edge)], mode="reflect")
    return np.median(np.lib.stride_tricks.sliding_window_view(padded, width, axis=-1), axis=-1)


def warped(cost: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Finds the cheapest monotonic path through a matrix (dynamic time warping).

    Args:
        cost: float[n, m].

    Returns:
        int[k] rows and int[k] columns of the path, from (0, 0) to (n - 1, m - 1). Each step increases one or both.
    """
    n, m = cost.shape
    # Sums and steps along anti-diagonals: those with the row i and the column d - i do not depend on one another.
    total = np.full((n + 1, m + 1), np.inf, np.float32)
    step = np.full((n + 1, m + 1), 2, np.int8)  # 0: both, 1: a row, 2: a column
    total[0, 0], step[1:, 0] = 0, 1
    for d in range(2, n + m + 1):
        i = np.arange(max(1, d - m), min(n, d - 1) + 1)
        j = d - i
        both, row, column = total[i - 1, j - 1], total[i - 1, j], total[i, j - 1]
        kind = np.where((both < row) & (both < column), 0, np.where((row < both) & (row < column), 1, 2))
        step[i, j] = kind
        total[i, j] = cost[i - 1, j - 1] + np.choose(kind, (both, row, column))
    path, i, j = [], n, m
    while i > 0 or j > 0:
        path.append((i - 1, j - 1))
        kind = step[i, j]
        i, j = i - (kind != 2), j - (kind != 1)
    rows, columns = np.array(path[::-1]).T
    return rows, columns
