"""The steps of an image processor on one image: resize, crop, pad, cut into tiles or patches, normalise."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from einops import rearrange
from PIL import Image

from mllm_jax.data.pixels import require_call, require_padded, require_resized
from mllm_jax.data.tiles import best_resolution, cut, fitted_size, pad_to, tile_grid
from mllm_jax.errors import ConfigError, DataError

_MAX_ASPECT = 200
_RESIZE = "let it be resized"


def smart_resize(height: int, width: int, factor: int, min_pixels: int, max_pixels: int) -> tuple[int, int]:
    """Returns the sides nearest to an image's that are multiples of `factor`, with a number of pixels in a range.

    Halves are rounded to even. Thin images, whose shorter side becomes at least `factor`, may leave the range.

    Raises:
        DataError: no pixels, or one side more than 200 times the other.
    """
    if min(height, width) < 1 or max(height, width) > _MAX_ASPECT * min(height, width):
        raise DataError(
            f"an image of {height} x {width} pixels",
            f"sides whose ratio is at most {_MAX_ASPECT}",
            "crop it, or leave this record out",
        )
    high, wide = round(height / factor) * factor, round(width / factor) * factor
    if high * wide > max_pixels:
        shrink = math.sqrt(height * width / max_pixels)
        high, wide = (max(factor, math.floor(side / shrink / factor) * factor) for side in (height, width))
    elif high * wide < min_pixels:
        grow = math.sqrt(min_pixels / (height * width))
        high, wide = (math.ceil(side * grow / factor) * factor for side in (height, width))
    return high, wide


@dataclass(frozen=True)
class ImageProcessor:
    """The steps from a decoded image to the input of a vision encoder: resize, crop, rescale, normalise.

    Attributes:
        kind: transformers' name, without "Fast" or "Pil".
        size: (height, width) to resize to, for any aspect ratio.
        shortest_edge: or the shorter side, the aspect ratio kept.
        longest_edge: or the longer side, the aspect ratio kept, and the least length of the shorter side; fractions of
            pixels are rounded or, with `cuts_off`, cut off.
        pixel_range: or (least, most) pixels, sides multiples of patch_size * merge_size, the aspect ratio nearly kept.
        crop_size: (height, width) of the centre crop; a smaller image gets a black margin.
        background: None, or the colour with which an image is padded to a square before all other steps, with
            `longest_edge` after resizing; with `resolutions`, an image that is not cut into tiles.
        resolutions: empty, or the sizes to which an image may be resized before it is cut into tiles, see
            `mllm_jax.data.tiles`; tile_size is the side of those tiles.
        tile_range: None, or the least and the largest number of tiles of `size` that an image is cut into, see
            `mllm_jax.data.tiles`; the whole image comes last, unless it is one tile.
        low: None, or the processor that makes a second, smaller image from the result, for encoders that read both.
        resample: Pillow's number of the filter.
        rescale_factor: None leaves 0 to 255.
        mean, std: None normalises nothing.
        patch_size, merge_size, temporal_patch_size: for `patches`; 0 if the encoder itself cuts patches.
    """

    kind: str
    size: tuple[int, int] | None = None
    shortest_edge: int | None = None
    longest_edge: tuple[int, int] | None = None
    cuts_off: bool = False
    pixel_range: tuple[int, int] | None = None
    crop_size: tuple[int, int] | None = None
    background: tuple[int, int, int] | None = None
    resolutions: tuple[tuple[int, int], ...] = ()
    tile_size: int = 0
    tile_range: tuple[int, int] | None = None
    low: ImageProcessor | None = None
    resample: int = int(Image.Resampling.BICUBIC)
    rescale_factor: float | None = 1 / 255
    mean: tuple[float, float, float] | None = None
    std: tuple[float, float, float] | None = None
    patch_size: int = 0
    merge_size: int = 1
    temporal_patch_size: int = 1

    def __call__(self, image: np.ndarray) -> np.ndarray:
        """Processes one image.

        Args:
            image: uint8 [h, w, 3], as returned by `decode_image`.

        Returns:
            float32 [H, W, 3].

        Raises:
            DataError: another dtype or shape, no pixels, sides that smart resizing refuses, or an image so long and
                thin that it would become too large, see `mllm_jax.data.pixels`.
        """
        return self.normalise(self.prepare(image))

    def prepare(self, image: np.ndarray) -> np.ndarray:
        """Processes one image into one tile of bytes, uint8[H, W, 3], for `normalise`; raises as `__call__` does."""
        _require_image(image)
        self.require(image.shape[:2])
        if self.background is None:
            return self._tile(image)
        if self.longest_edge is not None:
            return self._squared(self._tile(image))
        return self._tile(self._squared(image))

    def tiles(self, image: np.ndarray) -> np.ndarray:
        """Processes one image into all its tiles, uint8[N, H, W, 3]: the whole image first, last with `tile_range`."""
        _require_image(image)
        count = self.count(*image.shape[:2])
        if self.tile_range is not None:
            rows, columns = tile_grid(image.shape[:2], self.size, *self.tile_range)
            large = self._to_size(image, (self.size[0] * rows, self.size[1] * columns))
            tiles = rearrange(large, "(r h) (c w) k -> (r c) h w k", r=rows, c=columns)
            return tiles if count == 1 else np.concatenate([tiles, self._to_size(image, self.size)[None]])
        if not self.resolutions:
            return self.prepare(image)[None]
        target = best_resolution(image.shape[:2], self.resolutions)
        large = pad_to(self._to_size(image, fitted_size(image.shape[:2], target)), target)
        small = self._to_size(image, self.size or (self.shortest_edge, self.shortest_edge))
        return np.stack([self._tile(tile) for tile in (small, *cut(large, self.tile_size))])

    def count(self, height: int, width: int) -> int:
        """Counts the tiles of an image of the given size; raises as `tiles` does."""
        size = height, width
        if self.tile_range is not None:
            rows, columns = tile_grid(size, self.size, *self.tile_range)
            require_resized(size, (self.size[0] * rows, self.size[1] * columns))
            return rows * columns + (rows * columns > 1)
        if not self.resolutions:
            self.require(size)
            return 1
        target = best_resolution(size, self.resolutions)
        require_resized(size, target)
        require_resized(size, self.size or (self.shortest_edge, self.shortest_edge))
        require_call(self.pixels(*size), "the tiles of an image")
        self._require_tile((self.tile_size, self.tile_size))
        return 1 + math.prod(-(-side // self.tile_size) for side in target)

    def grid(self, frames: int, height: int, width: int) -> tuple[int, int, int]:
        """Returns (time, rows, columns) of the patches of frames of the given size; raises as `patches` does."""
        if not self.patch_size:
            raise ConfigError(f"patches from a {self.kind}", "one with a patch_size", "call it for pixels")
        high, wide = self.output_size(height, width)
        require_call(frames * high * wide, f"{frames} frames")
        self.require((height, width))
        side = self.patch_size * self.merge_size
        if high % side or wide % side:
            raise DataError(f"an image of {high} x {wide} pixels", f"sides that are multiples of {side}", _RESIZE)
        return -(-frames // self.temporal_patch_size), high // self.patch_size, wide // self.patch_size

    def normalise(self, pixels: np.ndarray) -> np.ndarray:
        """Converts uint8[..., 3] to float32[..., 3]."""
        return self._values()[pixels, np.arange(3)]

    def for_encoder(self, pixels: np.ndarray, encoder: Any) -> np.ndarray:
        """Returns the bytes themselves if the encoder normalises them in the same way, else the numbers."""
        on_device = (1 / 255, tuple(encoder.image_mean), tuple(encoder.image_std))
        return pixels if (self.rescale_factor, self.mean, self.std) == on_device else self.normalise(pixels)

    def require(self, given: tuple[int, int]) -> None:
        """Refuses an image of that size that `prepare` would make too large."""
        if self.background is not None and self.longest_edge is None:
            square = (max(given),) * 2
            require_padded(given, square)
            given = square
        self._require_tile(given)
        if self.background is not None and self.longest_edge is not None:
            made = self._sides(*given)
            require_padded(made, (max(made),) * 2)

    def _require_tile(self, given: tuple[int, int]) -> None:
        size = self._resized(*given)
        require_resized(given, size)
        if self.crop_size is not None:
            require_padded(given, (max(size[0], self.crop_size[0]), max(size[1], self.crop_size[1])))

    def _tile(self, image: np.ndarray) -> np.ndarray:
        size = self._resized(*image.shape[:2])
        if (self.size, self.shortest_edge, self.longest_edge, self.pixel_range) != (None,) * 4:
            image = self._to_size(image, size)
        return image if self.crop_size is None else _crop_centre(image, *self.crop_size)

    def _squared(self, image: np.ndarray) -> np.ndarray:
        return pad_to(image, (max(image.shape[:2]),) * 2, self.background)

    def _sides(self, height: int, width: int) -> tuple[int, int]:
        """Returns (H, W) of a tile from `_tile`."""
        return self.crop_size or self._resized(height, width)

    def _to_size(self, image: np.ndarray, size: tuple[int, int]) -> np.ndarray:
        source = Image.fromarray(np.ascontiguousarray(image))
        return np.asarray(source.resize(size[::-1], Image.Resampling(self.resample)))

    def patches(self, *frames: np.ndarray) -> tuple[np.ndarray, tuple[int, int, int]]:
        """Processes one image, or the frames of a video, into patches; patches that are merged are adjacent.

        Args:
            frames: uint8 [h, w, 3] each, of one size; one is a still image.

        Returns:
            float32 [N, 3 * temporal_patch_size * patch_size^2], channels first inside a patch, the last frame repeated
            to fill whole patches in time; and (time, rows, columns) of patches, whose product is N.

        Raises:
            DataError: as `__call__`; or sides that are no multiples of merged patches.
            ConfigError: a processor without patches.
        """
        for frame in frames:
            _require_image(frame)
        grid = self.grid(len(frames), *frames[0].shape[:2])
        pixels = np.stack([self(frame) for frame in frames])
        pixels = np.concatenate([pixels, *[pixels[-1:]] * (-len(pixels) % self.temporal_patch_size)])
        cut = rearrange(
            pixels,
            "(f t) (h p a) (w q b) c -> (f h w p q) (c t a b)",
            p=self.merge_size,
            q=self.merge_size,
            a=self.patch_size,
            b=self.patch_size,
            t=self.temporal_patch_size,
        )
        return cut, grid

    def output_size(self, height: int, width: int) -> tuple[int, int]:
        """Returns (H, W) of the result for an image of the given size. Raises DataError as `__call__` does."""
        if self.background is not None and self.longest_edge is None:
            height = width = max(height, width)
        sides = self._sides(height, width)
        return sides if self.background is None or self.longest_edge is None else (max(sides),) * 2

    def pixels(self, height: int, width: int) -> int:
        """Returns the number of pixels of all tiles of an image of the given size; raises as `tiles` does."""
        if self.tile_range is not None:
            count = math.prod(tile_grid((height, width), self.size, *self.tile_range))
            return (count + (count > 1)) * math.prod(self.size)
        if self.resolutions:
            target = best_resolution((height, width), self.resolutions)
            count = 1 + math.prod(-(-side // self.tile_size) for side in target)
            return count * math.prod(self._sides(self.tile_size, self.tile_size))
        return math.prod(self.output_size(height, width))

    def _resized(self, height: int, width: int) -> tuple[int, int]:
        if self.size is not None:
            return self.size
        if self.shortest_edge is not None:
            short, long = min(height, width), max(height, width)
            long = int(self.shortest_edge * long / short)
            return (long, self.shortest_edge) if width <= height else (self.shortest_edge, long)
        if self.longest_edge is not None:
            (longest, least), long = self.longest_edge, max(height, width)
            if self.cuts_off:
                return max(int(height / long * longest), least), max(int(width / long * longest), least)
            return max(round(height * (longest / long)), least), max(round(width * (longest / long)), least)
        if self.pixel_range is not None:
            return smart_resize(height, width, self.patch_size * self.merge_size, *self.pixel_range)
        return height, width

    def _values(self) -> np.ndarray:
        """Returns float32 [256, 3], the value of each byte in each channel, with the steps' own precision and order."""
        values = np.arange(256, dtype=np.float32)
        if self.rescale_factor is not None:
            values = (values.astype(np.float64) * self.rescale_factor).astype(np.float32)
        values = np.repeat(values[:, None], 3, axis=1)
        if self.mean is not None:
            values = (values - np.array(self.mean, np.float32)) / np.array(self.std, np.float32)
        return values


def mismatch(given: str, expected: str) -> ConfigError:
    """Returns the refusal of a processor that makes other images than its model reads."""
    todo = "restore preprocessor_config.json and config.json, which do not belong together"
    return ConfigError(given, expected, todo)


def _require_image(image: np.ndarray) -> None:
    if not isinstance(image, np.ndarray):
        given = f"a {type(image).__name__}"
    elif image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3:
        given = f"{image.dtype} {list(image.shape)}"
    elif not image.size:
        given = f"an image of {image.shape[0]} x {image.shape[1]} pixels"
    else:
        return
    raise DataError(
        given,
        "uint8 [height, width, 3] with at least one pixel",
        "decode it with mllm_jax.decode_image, which turns every mode into RGB",
    )


def _crop_centre(image: np.ndarray, height: int, width: int) -> np.ndarray:
    """Crops the centre; for an odd margin, cuts one more pixel below and right, or adds one (black) above and left."""
    missing = [max(0, wanted - given) for wanted, given in zip((height, width), image.shape[:2], strict=True)]
    image = np.pad(image, [*((-(-n // 2), n // 2) for n in missing), (0, 0)])
    top, left = (image.shape[0] - height) // 2, (image.shape[1] - width) // 2
    return image[top : top + height, left : left + width]
