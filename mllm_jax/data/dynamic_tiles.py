"""InternVL's dynamic tiles (arXiv 2404.16821, section 3.3): a grid of tiles shaped like the picture, then a thumbnail.

All sizes are (height, width).
"""

from __future__ import annotations

from functools import lru_cache

from mllm_jax.errors import ConfigError

Size = tuple[int, int]

MAX_TILES = 1_000  # InternVL's own settings have 6 to 40


@lru_cache(maxsize=256)
def tile_grid(size: Size, tile: Size, least: int, most: int) -> Size:
    """How many rows and columns of tiles a picture becomes.

    The grid whose ratio of columns to rows is nearest to the picture's ratio of width to height, both taken as they
    are, not their logarithms. Among equals the smaller one, unless the picture has more pixels than half of those that
    a larger one's tiles have.

    Args:
        size: the picture's.
        tile: a tile's.
        least, most: how many tiles there may be, without the thumbnail.

    Raises:
        ConfigError: more tiles than any model takes.
    """
    if most > MAX_TILES:
        raise ConfigError(f"up to {most:,} tiles of an image", f"at most {MAX_TILES:,}", "set fewer")
    height, width = size
    counts = range(1, most + 1)
    grids = [(rows, columns) for columns in counts for rows in counts if least <= rows * columns <= most]
    best, nearest = (1, 1), float("inf")
    for rows, columns in sorted(grids, key=lambda grid: grid[0] * grid[1]):  # of as many tiles, the fewest columns
        distance = abs(width / height - columns / rows)
        fills = 2 * height * width > tile[0] * tile[1] * rows * columns
        if distance < nearest or (distance == nearest and fills):
            best, nearest = (rows, columns), distance
    return best
