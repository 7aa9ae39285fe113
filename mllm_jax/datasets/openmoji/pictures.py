"""Pictures of a split at the sizes that are asked for, decoded once and kept within a bound of memory."""

from __future__ import annotations

import numpy as np

from mllm_jax.data.images import decode_image, resize
from mllm_jax.datasets.openmoji.catalog import Catalog, Dice
from mllm_jax.datasets.openmoji.scenes import Scene

_CACHE_BYTES = 256 * 2**20
_SCALES = (1.0, 0.95, 0.9, 0.85)  # few, so that each resized picture is used again


class Pictures:
    """The pictures of a catalog; what it returns is shared or fresh, and must not be written to."""

    def __init__(self, catalog: Catalog):
        self._catalog = catalog
        self._cache: dict[tuple[int, int], np.ndarray] = {}
        self._bytes = 0

    def single(self, index: int, size: int, dice: Dice | None = None) -> np.ndarray:
        """Picture `index`: uint8 [size, size, 3]; with `dice`, a little smaller and shifted on its white ground.

        Raises:
            DataError: the stored picture cannot be decoded; names the split, the index and the reason.
        """
        if dice is None:
            return self._resized(index, size)
        canvas = np.full((size, size, 3), 255, np.uint8)
        self._paste(canvas, index, 0, 0, size, dice)
        return canvas

    def scene(self, scene: Scene, size: int, dice: Dice | None = None) -> np.ndarray:
        """A grid of pictures: uint8 [size, size, 3]; with `dice`, each shifted and scaled a little in its cell."""
        canvas = np.full((size, size, 3), 255, np.uint8)
        cell = size // scene.grid
        margin = (size - cell * scene.grid) // 2
        for place, index in enumerate(scene.cells):
            row, column = divmod(place, scene.grid)
            self._paste(canvas, index, margin + row * cell, margin + column * cell, cell, dice)
        return canvas

    def _paste(self, canvas: np.ndarray, index: int, top: int, left: int, cell: int, dice: Dice | None) -> None:
        size = cell
        if dice is not None:
            size = round(cell * dice.pick(_SCALES))
            top += dice.below(cell - size + 1)
            left += dice.below(cell - size + 1)
        canvas[top : top + size, left : left + size] = self._resized(index, size)

    def _resized(self, index: int, size: int) -> np.ndarray:
        picture = self._cache.get((index, size))
        if picture is None:
            record = self._catalog.records[index]
            what = f"record {index} ({record.name}) of {self._catalog.where}"
            picture = resize(decode_image(record.image, what=what), size)
            picture.setflags(write=False)
            if self._bytes + picture.nbytes <= _CACHE_BYTES:
                self._cache[index, size] = picture
                self._bytes += picture.nbytes
        return picture

    def __getstate__(self) -> dict:
        return {"_catalog": self._catalog, "_cache": {}, "_bytes": 0}  # a worker process fills its own cache
