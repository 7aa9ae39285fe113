"""Images of any size as tiles of one size, and the positions of their media tokens (LLaVA-NeXT's "anyres").

The tiles of an image are: the whole image, squeezed into one; then the image, with its aspect ratio kept and margins
added, cut into the tiles of the resolution that fits it best. In the text the whole image comes first. The features of
the other tiles follow row by row, without those of the margins, with a newline vector after each row.
Sources: the blog posts on LLaVA-NeXT (January 2024) and LLaVA-OneVision (arXiv 2408.03326).

All sizes are (height, width).
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from functools import lru_cache
from typing import NamedTuple

import numpy as np
from einops import rearrange, repeat

from mllm_jax.data.processing.media import NEWLINE
from mllm_jax.errors import ConfigError

Size = tuple[int, int]

_REDUCES_ABOVE = 1.1  # LLaVA-OneVision keeps features whose number is only slightly too large


class Places(NamedTuple):
    """The vectors of an image in the text.

    Attributes:
        places: int[L], or int[L, 4] with weights: media tokens counted over the image's tiles, or NEWLINE.
        weights: float32[L, 4] of the media tokens whose sum is at a position, or None.
    """

    places: np.ndarray
    weights: np.ndarray | None = None


# ---- pixels


def best_resolution(size: Size, resolutions: Iterable[Size]) -> Size:
    """Returns the resolution that keeps most of an image's pixels; among equals the one with the smallest margins."""
    height, width = size

    def merit(resolution: Size) -> tuple[int, int]:
        scale = min(resolution[1] / width, resolution[0] / height)
        kept = min(int(width * scale) * int(height * scale), width * height)
        return kept, kept - resolution[0] * resolution[1]

    return max(resolutions, key=merit)


def fitted_size(size: Size, target: Size) -> Size:
    """Returns the largest size of an image inside the target with its aspect ratio kept, rounded up."""
    tall, wide = (inside / outside for inside, outside in zip(target, size, strict=True))
    if wide < tall:
        return min(math.ceil(size[0] * wide), target[0]), target[1]
    return target[0], min(math.ceil(size[1] * tall), target[1])


def pad_to(image: np.ndarray, target: Size, colour: tuple[int, int, int] = (0, 0, 0)) -> np.ndarray:
    """Pads uint8[h, w, 3] to uint8[*target, 3]: a margin on both sides, an odd pixel below or right."""
    padded = np.empty((*target, 3), np.uint8)
    padded[:] = colour
    (height, width), (tall, wide) = image.shape[:2], target
    top, left = (tall - height) // 2, (wide - width) // 2
    padded[top : top + height, left : left + width] = image
    return padded


def cut(image: np.ndarray, side: int) -> list[np.ndarray]:
    """Cuts an image into tiles, row by row; those at its lower and right edge may be smaller."""
    rows, columns = (range(0, length, side) for length in image.shape[:2])
    return [image[top : top + side, left : left + side] for top in rows for left in columns]


Size = tuple[int, int]

MAX_TILES = 1_000  # InternVL's own settings have 6 to 40


@lru_cache(maxsize=256)
def tile_grid(size: Size, tile: Size, least: int, most: int) -> Size:
    """Returns the numbers of rows and columns of tiles that an image becomes.

    The grid whose ratio of columns to rows is nearest to the image's ratio of width to height; the ratios themselves
    are compared, not their logarithms. Among equals the smaller one, unless the image has more than half as many pixels
    as the tiles of a larger one.

    Args:
        size: of the image.
        tile: size of a tile.
        least, most: bounds on the number of tiles, without the thumbnail.

    Raises:
        ConfigError: more tiles than any model takes.
    """
    if most > MAX_TILES:
        raise ConfigError(f"up to {most:,} tiles of an image", f"at most {MAX_TILES:,}", "set fewer")
    height, width = size
    counts = range(1, most + 1)
    grids = [(rows, columns) for columns in counts for rows in counts if least <= rows * columns <= most]
    best, nearest = (1, 1), float("inf")
    for rows, columns in sorted(
        grids, key=lambda grid: grid[0] * grid[1]
    ):  # among equal numbers of tiles, fewest columns
        distance = abs(width / height - columns / rows)
        fills = 2 * height * width > tile[0] * tile[1] * rows * columns
        if distance < nearest or (distance == nearest and fills):
            best, nearest = (rows, columns), distance
    return best


# ---- positions


def unpadded(size: Size, grid: Size, rounds: bool = True) -> tuple[slice, slice]:
    """Returns the rows and columns of a grid of features over a padded image that show the image.

    Args:
        size: the image's own.
        grid: features of the image with its margins.
        rounds: to 7 decimal places before the rest is cut off, as transformers does; the original repository cuts at
            once, which may lose a row of the image.
    """
    (height, width), (rows, columns) = size, grid

    def middle(length: int, whole: float) -> slice:
        margin = (length - int(round(whole, 7) if rounds else whole)) // 2
        return slice(margin, length - margin)

    if width / height > columns / rows:
        return middle(rows, height * (columns / width)), slice(0, columns)
    return slice(0, rows), middle(columns, width * (rows / height))


def anyres_places(
    size: Size, resolution: Size, tile: int, grid: int, max_tiles: int | None = None, rounds: bool = True
) -> Places:
    """Returns the positions of an image that is cut into tiles.

    Args:
        size: of the image, in pixels.
        resolution: its `best_resolution`, whole tiles.
        tile: side of a tile in pixels; grid: in media tokens, which are counted row by row, tile by tile.
        max_tiles: features of more tiles are resized to about this number (LLaVA-OneVision's "anyres_max_9").
        rounds: see `unpadded`.
    """
    down, across = (length // tile for length in resolution)
    tokens = np.arange(grid**2, grid**2 * (1 + down * across))
    tokens = rearrange(tokens, "(i j r c) -> (i r) (j c)", i=down, j=across, r=grid, c=grid)
    tokens = tokens[unpadded(size, tokens.shape, rounds)]
    ratio = 0.0 if max_tiles is None else math.sqrt(tokens.size / (max_tiles * grid**2))
    whole = Places(np.arange(grid**2))
    if ratio > _REDUCES_ABOVE:
        return _joined(whole, _lines(resized(tokens, tuple(int(length // ratio) for length in tokens.shape))))
    return _joined(whole, _lines(Places(tokens)))


def tile_places(grid: int) -> Places:
    """Returns the positions of a one-tile image and a newline, as in LLaVA-OneVision's texts of several images."""
    return Places(np.append(np.arange(grid**2), NEWLINE))


def video_places(frames: int, grid: int) -> Places:
    """Returns the positions of a video: each frame is a tile of half its sides, rounded up; a newline at the end."""
    tokens = rearrange(np.arange(frames * grid**2), "(f r c) -> f r c", r=grid, c=grid)
    half = [resized(frame, (-(-grid // 2), -(-grid // 2))) for frame in tokens]
    flat = [Places(rearrange(p, "r c k -> (r c) k"), rearrange(w, "r c k -> (r c) k")) for p, w in half]
    return _joined(*flat, Places(np.array([NEWLINE])))


def resized(tokens: np.ndarray, size: Size) -> Places:
    """Resizes a grid of features by linear interpolation of pixel centres, without antialiasing.

    Args:
        tokens: int[r, c], indices of the features.

    Returns:
        int[*size, 4] and float32[*size, 4].
    """
    (low_r, high_r, part_r), (low_c, high_c, part_c) = map(_neighbours, tokens.shape, size)
    rows, columns = np.stack([low_r, high_r], -1), np.stack([low_c, high_c], -1)  # [n, 2] each
    places = tokens[rows[:, None, :, None], columns[None, :, None, :]]
    weights = np.stack([1 - part_r, part_r], -1)[:, None, :, None] * np.stack([1 - part_c, part_c], -1)[None, :, None]
    return Places(*(rearrange(x, "r c a b -> r c (a b)") for x in (places, weights)))


def _neighbours(given: int, wanted: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Returns the two of `given` between which each of `wanted` is, and its fraction of the way to the second."""
    scale = np.float32(given / wanted)  # in float32 throughout, as torch computes it
    at = np.maximum((np.arange(wanted, dtype=np.float32) + np.float32(0.5)) * scale - np.float32(0.5), 0)
    low = np.minimum(at.astype(np.int64), given - 1)
    return low, np.minimum(low + 1, given - 1), at - low.astype(np.float32)


def _lines(grid: Places) -> Places:
    """Returns a grid [r, c] or [r, c, 4] row by row, with a newline after each row."""

    def flat(x: np.ndarray, end: float) -> np.ndarray:
        x = np.concatenate([x, np.full((len(x), 1, *x.shape[2:]), end, x.dtype)], axis=1)
        return rearrange(x, "r c ... -> (r c) ...")

    places = flat(grid.places, NEWLINE)
    return Places(places) if grid.weights is None else _only_first(Places(places, flat(grid.weights, 0)))


def _only_first(places: Places) -> Places:
    """Gives newlines, of which there is one at a position, all the weight on the first entry."""
    weights = np.where(places.places == NEWLINE, np.eye(1, 4, dtype=np.float32), places.weights)
    return Places(places.places, weights)


def _joined(*parts: Places) -> Places:
    """Concatenates positions; with weights if any part has them."""
    if all(part.weights is None for part in parts):
        return Places(np.concatenate([part.places for part in parts]))
    alone = np.eye(1, 4, dtype=np.float32)
    return Places(
        np.concatenate([p if w is not None else repeat(p, "l -> l 4") for p, w in parts]),
        np.concatenate([w if w is not None else np.repeat(alone, len(p), axis=0) for p, w in parts]),
    )
