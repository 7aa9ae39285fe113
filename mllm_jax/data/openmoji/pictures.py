"""Pictures of a split at the sizes that are asked for, decoded once and kept within a bound of memory."""

from __future__ import annotations

import numpy as np

from mllm_jax.data.images import decode_image, resize
from mllm_jax.data.openmoji.catalog import Catalog, Dice
from mllm_jax.data.openmoji.scenes import Scene

_CACHE_BYTES = 256 * 2**20
_SCALES = (1.0, 0.95, 0.9, 0.85)  # few, so that each resized picture is used again
_STRETCHES = (1.0, 0.92, 0.84, 0.76)
# A mirror would make something else of them, or a text that nobody reads.
_SIDED_CATEGORIES, _SIDED_WORDS = ("symbols", "flags"), ("left", "right", "moon", "clock", "thirty")


class Pictures:
    """The pictures of a catalog; what it returns is shared or fresh, and must not be written to.

    Args:
        stretch: with dice, the picture of a base that has no other is stretched and mirrored as well, so that it does
            not always look the same.
    """

    def __init__(self, catalog: Catalog, stretch: bool = False):
        self._catalog, self._stretch = catalog, stretch
        self._cache: dict[tuple[int, int, int], np.ndarray] = {}
        self._bytes = 0

    def single(self, index: int, size: int, dice: Dice | None = None) -> np.ndarray:
        """Picture `index`: uint8 [size, size, 3]; with `dice`, a little smaller and shifted on its white ground.

        Raises:
            DataError: the stored picture cannot be decoded; names the split, the index and the reason.
        """
        if dice is None:
            return self._resized(index, size, size)
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
        height = width = cell
        mirrored = False
        if dice is not None:
            height = width = round(cell * dice.pick(_SCALES))
            record = self._catalog.records[index]
            if self._stretch and len(self._catalog.by_base[record.base]) == 1:
                height, width = (round(cell * dice.pick(_STRETCHES)) for _ in range(2))
                sided = record.category in _SIDED_CATEGORIES or any(word in record.name for word in _SIDED_WORDS)
                mirrored = dice.chance(0.5) and not sided
            top += dice.below(cell - height + 1)
            left += dice.below(cell - width + 1)
        picture = self._resized(index, height, width)
        canvas[top : top + height, left : left + width] = picture[:, ::-1] if mirrored else picture

    def _resized(self, index: int, height: int, width: int) -> np.ndarray:
        picture = self._cache.get((index, height, width))
        if picture is None:
            record = self._catalog.records[index]
            what = f"record {index} ({record.name}) of {self._catalog.where}"
            picture = resize(decode_image(record.image, what=what), (height, width))
            picture.setflags(write=False)
            if self._bytes + picture.nbytes <= _CACHE_BYTES:
                self._cache[index, height, width] = picture
                self._bytes += picture.nbytes
        return picture

    def __getstate__(self) -> dict:
        # A worker process fills its own cache.
        return {"_catalog": self._catalog, "_stretch": self._stretch, "_cache": {}, "_bytes": 0}
