"""Images of a split at the sizes that sources ask for, decoded once, in a cache of bounded size."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from mllm_jax.data.images import decode_image, resize
from mllm_jax.datasets.openmoji.catalog import Catalog, Dice
from mllm_jax.datasets.openmoji.scenes import Scene

_CACHE_BYTES = 256 * 2**20
_SCALES = (1.0, 0.95, 0.9, 0.85)  # few, so that resized images are reused


def grid_cells(size: int, rows: int, columns: int) -> list[tuple[int, int, int]]:
    """Returns (top, left, side) of the square cells of a grid in the middle of an image, in reading order."""
    side = size // max(rows, columns)
    top, left = (size - side * rows) // 2, (size - side * columns) // 2
    return [(top + row * side, left + column * side, side) for row in range(rows) for column in range(columns)]


class EmojiImages:
    """The images of a catalog. Returned arrays may be shared: do not write to them."""

    def __init__(self, catalog: Catalog):
        self._catalog = catalog
        self._cache: dict[tuple[int, int], np.ndarray] = {}
        self._bytes = 0

    def single(self, index: int, size: int, dice: Dice | None = None) -> np.ndarray:
        """Returns image `index` as uint8 [size, size, 3]; with `dice`, slightly smaller and shifted on white.

        Raises:
            DataError: the stored image cannot be decoded; reports the split, the index and the reason.
        """
        if dice is None:
            return self._resized(index, size)
        canvas = np.full((size, size, 3), 255, np.uint8)
        self._paste(canvas, index, 0, 0, size, dice)
        return canvas

    def scene(self, scene: Scene, size: int, dice: Dice | None = None) -> np.ndarray:
        """Returns a grid of images as uint8 [size, size, 3]; with `dice`, each is shifted and scaled in its cell."""
        return self.grid(scene.cells, scene.grid, scene.grid, size, dice)

    def grid(
        self, cells: Sequence[int | None], rows: int, columns: int, size: int, dice: Dice | None = None
    ) -> np.ndarray:
        """Returns images in the cells of `grid_cells` as uint8 [size, size, 3]; None leaves a cell white."""
        canvas = np.full((size, size, 3), 255, np.uint8)
        for index, (top, left, side) in zip(cells, grid_cells(size, rows, columns), strict=True):
            if index is not None:
                self._paste(canvas, index, top, left, side, dice)
        return canvas

    def _paste(self, canvas: np.ndarray, index: int, top: int, left: int, cell: int, dice: Dice | None) -> None:
        size = cell
        if dice is not None:
            size = round(cell * dice.pick(_SCALES))
            top += dice.below(cell - size + 1)
            left += dice.below(cell - size + 1)
        canvas[top : top + size, left : left + size] = self._resized(index, size)

    def _resized(self, index: int, size: int) -> np.ndarray:
        image = self._cache.get((index, size))
        if image is None:
            record = self._catalog.records[index]
            what = f"record {index} ({record.name}) of {self._catalog.where}"
            image = resize(decode_image(record.image, what=what), size)
            image.setflags(write=False)
            if self._bytes + image.nbytes <= _CACHE_BYTES:
                self._cache[index, size] = image
                self._bytes += image.nbytes
        return image

    def __getstate__(self) -> dict:
        return {"_catalog": self._catalog, "_cache": {}, "_bytes": 0}  # each worker process fills its own cache
