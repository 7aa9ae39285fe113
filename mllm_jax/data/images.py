"""Decodes and resizes images from untrusted sources: bounded, complete, and always uint8 RGB."""

from __future__ import annotations

import io
import os
import warnings
from collections.abc import Callable

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from mllm_jax.errors import DataError
from mllm_jax.files import read_bytes

MAX_PIXELS = 50_000_000
MAX_BYTES = 512 << 20  # of a file: MAX_PIXELS without compression take 150 MB, with 16 bits a sample twice as much
# Formats that Pillow decodes in-process; others (such as EPS) would start other programs on untrusted bytes.
FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "PPM")


def decode_image(data: bytes, *, what: str) -> np.ndarray:
    """Decodes an encoded image as a person would see it.

    Grey, palette and CMYK become RGB, transparency is blended with white, 16-bit samples keep their high byte, and the
    EXIF orientation is applied.

    Args:
        data: the encoded bytes (PNG, JPEG, WebP, GIF, BMP, TIFF or PPM; of an animation the first frame).
        what: name of the image for messages, such as "record 12 of openmoji/train".

    Returns:
        uint8 [height, width, 3].

    Raises:
        DataError: the bytes are no image, are truncated, or the header declares more than 50 megapixels.
    """
    try:
        with warnings.catch_warnings():
            # Pillow warns from 89 megapixels on; the bound below is lower and is an error.
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            image = Image.open(io.BytesIO(data), formats=FORMATS)
    except Image.DecompressionBombError as error:
        raise _too_large(what, "far more pixels") from error
    except Exception as error:  # Pillow's plugins raise many types on hostile bytes
        raise _broken(what, error) from error
    if image.width * image.height > MAX_PIXELS:
        raise _too_large(what, f"{image.width} x {image.height} pixels")
    try:
        image.load()
        return np.array(_to_rgb(ImageOps.exif_transpose(image)))
    except Exception as error:
        raise _broken(what, error) from error


def read_image(path: str | os.PathLike) -> np.ndarray:
    """Reads and decodes an image file; returns and raises what `decode_image` does.

    Raises:
        DataError: also if the file is missing, cannot be read, is a pipe or a device, or is larger than MAX_BYTES.
    """
    try:
        data = read_bytes(path, MAX_BYTES, DataError)
    except OSError as error:
        raise DataError(
            f"the image {os.fspath(path)} cannot be read ({type(error).__name__}: {error.strerror or error})",
            "a file that exists and may be read",
            "correct the path or its permissions",
        ) from error
    return decode_image(data, what=os.fspath(path))


def as_picture(image: np.ndarray | Image.Image | bytes | str | os.PathLike) -> np.ndarray:
    """Converts an image in any common form to uint8[H, W, 3].

    Raises:
        DataError: a file that cannot be read, an image that Pillow cannot finish reading or whose samples are floating
            point, an array of another shape or dtype, or another type of object.
    """
    if isinstance(image, Image.Image):
        try:
            return np.asarray(_to_rgb(image))
        except Exception as error:  # Pillow reads the file when its pixels are needed
            raise _broken("a Pillow image", error) from error
    if isinstance(image, (str, os.PathLike)):
        return read_image(image)
    if isinstance(image, bytes):
        return decode_image(image, what="an image")
    if hasattr(image, "__array__"):
        image = np.asarray(image)  # also draws a `Drawn`
    if isinstance(image, np.ndarray) and image.dtype == np.uint8 and image.ndim == 3 and image.shape[-1] == 3:
        return image
    given = f"{image.dtype}{list(image.shape)}" if isinstance(image, np.ndarray) else f"a {type(image).__name__}"
    raise DataError(
        f"an image given as {given}",
        "uint8[height, width, 3], a Pillow image, a path, or the bytes of a file",
        "convert it; download a file from the network first",
    )


class Drawn:
    """An image that is drawn each time it is read, for sources that draw their images."""

    def __init__(self, draw: Callable[[], np.ndarray]):
        self.draw = draw

    def __array__(self, dtype=None, copy=None) -> np.ndarray:
        return self.draw()


def resize(image: np.ndarray, size: int | tuple[int, int]) -> np.ndarray:
    """Resizes an image, filtering so that thin lines survive.

    Args:
        image: uint8 [height, width, 3].
        size: the new side, or (height, width), in pixels; the aspect ratio is not kept.

    Returns:
        uint8 [new height, new width, 3], a fresh array.
    """
    height, width = (size, size) if isinstance(size, int) else size
    if image.shape[:2] == (height, width):
        return image.copy()
    # Averaging whole blocks is exact and does not ring; any other factor needs a windowed filter.
    whole_blocks = image.shape[0] % height == 0 and image.shape[1] % width == 0
    method = Image.Resampling.BOX if whole_blocks else Image.Resampling.LANCZOS
    return np.array(Image.fromarray(image).resize((width, height), method))


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode == "F":
        raise ValueError("samples are floating point, whose range is unknown")
    if image.mode.startswith("I"):  # 16-bit grey, which Pillow keeps as 16- or 32-bit integers
        samples, clear = np.asarray(image).astype(np.int64), image.info.get("transparency")
        high = np.clip(samples, 0, 65535) >> 8
        if isinstance(clear, int):
            high[samples == clear] = 255
        image = Image.fromarray(high.astype(np.uint8))
    if image.mode in ("LA", "La", "PA", "RGBA", "RGBa") or "transparency" in image.info:
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    return image.convert("RGB")


def _too_large(what: str, size: str) -> DataError:
    return DataError(
        f"{what}: the image's header declares {size}",
        f"at most {MAX_PIXELS:,} pixels, checked before anything is decoded",
        "scale the image down, or leave this record out",
    )


def _broken(what: str, error: Exception) -> DataError:
    reason = f"{type(error).__name__}: {error}"
    if isinstance(error, UnidentifiedImageError):  # its own text is an address in memory
        reason = "no header of these formats, or one without pixels"
    return DataError(
        f"{what}: cannot be decoded ({reason})",
        f"a complete {', '.join(FORMATS)} image",
        "restore the file from its origin, or leave this record out",
    )
