"""What an image processor does to one image: resize, crop, pad, cut into tiles or patches, normalise."""

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
    """The sides nearest to a picture's that are multiples of `factor`, with a number of pixels in a range.

    Halves are rounded to even. The range may be left by thin pictures, whose shorter side is at least `factor`.

    Raises:
        DataError: no pixels, or one side more than 200 times the other.
    """
    if min(height, width) < 1 or max(height, width) > _MAX_ASPECT * min(height, width):
        raise DataError(
            f"a picture of {height} x {width} pixels",
            f"sides of which none is more than {_MAX_ASPECT} times the other",
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
    """The steps from a decoded picture to what a vision encoder reads: resize, crop, rescale, normalise.

    Attributes:
        kind: transformers' name, without "Fast" or "Pil".
        size: (height, width) to resize to, whatever the aspect ratio.
        shortest_edge: or the shorter side, the aspect ratio kept.
        longest_edge: or the longer side, the aspect ratio kept, and the least that the shorter side becomes; what is
            over whole pixels is rounded or, with `cuts_off`, left out.
        pixel_range: or (least, most) pixels, sides multiples of patch_size * merge_size, the aspect ratio nearly kept.
        crop_size: (height, width) of the crop in the middle; a smaller picture gets a black margin.
        background: None, or the colour with which a picture becomes a square before all else, with `longest_edge`
            behind its resizing; where there are `resolutions`, one that is not cut into tiles.
        resolutions: empty, or those that a picture may be resized to before it is cut into tiles, see
            `mllm_jax.data.tiles`; tile_size is the side of those tiles.
        tile_range: None, or the least and the most tiles of `size` that a picture is cut into, see
            `mllm_jax.data.tiles`; the whole picture comes last, unless it is one tile.
        low: None, or what makes a second, smaller picture of what this makes, for encoders that read both.
        resample: Pillow's number of the filter.
        rescale_factor: None leaves 0 to 255.
        mean, std: None normalises nothing.
        patch_size, merge_size, temporal_patch_size: for `patches`; 0 where the encoder cuts patches itself.
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
        """Processes one picture.

        Args:
            image: uint8 [h, w, 3], as `decode_image` gives it.

        Returns:
            float32 [H, W, 3].

        Raises:
            DataError: another dtype or shape, no pixels, sides that smart resizing refuses, or an image so long and
                thin that it would become too large, see `mllm_jax.data.pixels`.
        """
        return self.normalise(self.prepare(image))

    def prepare(self, image: np.ndarray) -> np.ndarray:
        """One picture as one tile of bytes, uint8[H, W, 3], which `normalise` makes numbers; raises as calling does."""
        _require_picture(image)
        self.require(image.shape[:2])
        if self.background is None:
            return self._tile(image)
        if self.longest_edge is not None:
            return self._squared(self._tile(image))
        return self._tile(self._squared(image))

    def tiles(self, image: np.ndarray) -> np.ndarray:
        """One picture as all its tiles: uint8[N, H, W, 3], the whole one first, or last with `tile_range`."""
        _require_picture(image)
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
        """How many tiles `tiles` makes of an image of that size, from its size alone; raises as `tiles` does."""
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
        """(time, rows, columns) of what `patches` makes of frames of that size, from it alone; raises as it does."""
        if not self.patch_size:
            raise ConfigError(f"patches from a {self.kind}", "one with a patch_size", "call it for pixels")
        high, wide = self.output_size(height, width)
        require_call(frames * high * wide, f"{frames} frames")
        self.require((height, width))
        side = self.patch_size * self.merge_size
        if high % side or wide % side:
            raise DataError(f"a picture of {high} x {wide} pixels", f"sides that are multiples of {side}", _RESIZE)
        return -(-frames // self.temporal_patch_size), high // self.patch_size, wide // self.patch_size

    def normalise(self, pixels: np.ndarray) -> np.ndarray:
        """uint8[..., 3] -> float32[..., 3]"""
        return self._values()[pixels, np.arange(3)]

    def for_encoder(self, pixels: np.ndarray, encoder: Any) -> np.ndarray:
        """The bytes themselves where the encoder's config has it normalise them like this, else the numbers."""
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
        """(H, W) of a tile that comes out of `_tile`."""
        return self.crop_size or self._resized(height, width)

    def _to_size(self, image: np.ndarray, size: tuple[int, int]) -> np.ndarray:
        picture = Image.fromarray(np.ascontiguousarray(image))
        return np.asarray(picture.resize(size[::-1], Image.Resampling(self.resample)))

    def patches(self, *frames: np.ndarray) -> tuple[np.ndarray, tuple[int, int, int]]:
        """Processes one picture, or the frames of a video, into patches, those that are merged side by side.

        Args:
            frames: uint8 [h, w, 3] each, of one size; one is a still.

        Returns:
            float32 [N, 3 * temporal_patch_size * patch_size^2], channels first inside a patch, the last frame repeated
            until time is whole patches; and (time, rows, columns) of patches, whose product is N.

        Raises:
            DataError: as calling does; or sides that whole merged patches do not fill.
            ConfigError: a processor without patches.
        """
        for frame in frames:
            _require_picture(frame)
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
        """(H, W) of what comes out for a picture of that size. Raises DataError as calling does."""
        if self.background is not None and self.longest_edge is None:
            height = width = max(height, width)
        sides = self._sides(height, width)
        return sides if self.background is None or self.longest_edge is None else (max(sides),) * 2

    def pixels(self, height: int, width: int) -> int:
        """How many pixels all tiles of an image of that size have; raises as `tiles` does."""
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
        """float32 [256, 3]: what each byte of each channel becomes; the steps' own precision and order."""
        values = np.arange(256, dtype=np.float32)
        if self.rescale_factor is not None:
            values = (values.astype(np.float64) * self.rescale_factor).astype(np.float32)
        values = np.repeat(values[:, None], 3, axis=1)
        if self.mean is not None:
            values = (values - np.array(self.mean, np.float32)) / np.array(self.std, np.float32)
        return values


def mismatch(given: str, expected: str) -> ConfigError:
    """The refusal of a processor that makes other images than its model reads."""
    todo = "restore preprocessor_config.json and config.json, which do not belong together"
    return ConfigError(given, expected, todo)


def _require_picture(image: np.ndarray) -> None:
    if not isinstance(image, np.ndarray):
        given = f"a {type(image).__name__}"
    elif image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3:
        given = f"{image.dtype} {list(image.shape)}"
    elif not image.size:
        given = f"a picture of {image.shape[0]} x {image.shape[1]} pixels"
    else:
        return
    raise DataError(
        given,
        "uint8 [height, width, 3] with at least one pixel",
        "decode it with mllm_jax.decode_image, which turns every mode into RGB",
    )


def _crop_centre(image: np.ndarray, height: int, width: int) -> np.ndarray:
    """The middle; of an odd number of pixels, one more is cut below and right, or added, black, above and left."""
    missing = [max(0, wanted - given) for wanted, given in zip((height, width), image.shape[:2], strict=True)]
    image = np.pad(image, [*((-(-n // 2), n // 2) for n in missing), (0, 0)])
    top, left = (image.shape[0] - height) // 2, (image.shape[1] - width) // 2
    return image[top : top + height, left : left + width]
