"""Decodes, resizes and measures images from untrusted sources: bounded, complete, and always uint8 RGB."""

from __future__ import annotations

import io
import os
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import BinaryIO, NamedTuple

import numpy as np
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError

from mllm_jax.errors import DataError
from mllm_jax.files import open_regular, read_bytes

MAX_PIXELS = 50_000_000
MAX_BYTES = 512 << 20  # of a file: MAX_PIXELS without compression take 150 MB, with 16 bits a sample twice as much
# Formats that Pillow decodes in-process; others (such as EPS) would start other programs on untrusted bytes.
FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "PPM")


class Size(NamedTuple):
    """Size of an image in pixels, from which the number of its positions follows."""

    height: int
    width: int


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
    image = _opened(io.BytesIO(data), what)
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
    with _readable(path):
        data = read_bytes(path, MAX_BYTES, DataError)
    return decode_image(data, what=os.fspath(path))


def image_size(image: np.ndarray | Image.Image | Size | bytes | str | os.PathLike) -> Size:
    """Reads the size of the result of `as_image`, for an image in any of its forms, from the header alone.

    A `Drawn` without a known size is drawn. A PNG with metadata after its pixels is decoded, as is a TIFF that is
    rotated by 90 degrees.

    Raises:
        DataError: see `as_image`; damaged pixels are not found.
    """
    if isinstance(image, Size):
        return image
    if isinstance(image, Drawn) and image.size is not None:
        return image.size()
    if isinstance(image, Image.Image):
        return Size(image.height, image.width)
    if isinstance(image, bytes):
        return _header_size(io.BytesIO(image), len(image), "an image")
    if isinstance(image, (str, os.PathLike)):
        with _readable(image), open_regular(image, DataError) as file:
            return _header_size(file, os.fstat(file.fileno()).st_size, os.fspath(image))
    return Size(*as_image(image).shape[:2])


def _header_size(file: BinaryIO, size: int, what: str) -> Size:
    if size > MAX_BYTES:
        raise DataError(f"{what} of {size:,} bytes", f"at most {MAX_BYTES:,} bytes", "name another file")
    image = _opened(file, what)
    try:
        if image.format == "PNG" and _speaks_later(file):
            image.load()
        # Pillow would decode a PNG for metadata after its pixels.
        turned = Image.Image.getexif(image).get(ExifTags.Base.Orientation, 1) in (5, 6, 7, 8)
        if turned and image.format == "TIFF":  # Pillow's versions disagree on its size before decoding
            image, turned = ImageOps.exif_transpose(image), False
        return Size(image.width, image.height) if turned else Size(image.height, image.width)
    except Exception as error:
        raise _broken(what, error) from error


def _speaks_later(file: BinaryIO) -> bool:
    """Returns whether a PNG has EXIF or text after its pixels; the file's position is unchanged."""
    before = file.tell()
    try:
        file.seek(8)
        pixels = False
        while len(head := file.read(8)) == 8 and head[4:] != b"IEND":
            if pixels and head[4:] in (b"eXIf", b"tEXt", b"zTXt", b"iTXt"):
                return True
            pixels |= head[4:] == b"IDAT"
            file.seek(int.from_bytes(head[:4], "big") + 4, io.SEEK_CUR)
        return False
    finally:
        file.seek(before)


def _opened(file: BinaryIO, what: str) -> Image.Image:
    """Reads an image's header, and refuses what must not be decoded."""
    try:
        with warnings.catch_warnings():
            # Pillow warns from 89 megapixels on; the bound below is stricter and is an error.
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            image = Image.open(file, formats=FORMATS)
    except Image.DecompressionBombError as error:
        raise _too_large(what, "far more pixels") from error
    except Exception as error:  # Pillow's plugins raise many kinds on hostile bytes
        raise _broken(what, error) from error
    if image.width * image.height > MAX_PIXELS:
        raise _too_large(what, f"{image.width} x {image.height} pixels")
    return image


@contextmanager
def _readable(path: str | os.PathLike) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise DataError(
            f"the image {os.fspath(path)} cannot be read ({type(error).__name__}: {error.strerror or error})",
            "a file that exists and may be read",
            "correct the path or its permissions",
        ) from error


def as_image(image: np.ndarray | Image.Image | bytes | str | os.PathLike) -> np.ndarray:
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
    """An image that is drawn each time it is read, for sources that draw their images.

    Args:
        draw: draws it.
        size: returns its size without drawing it, if possible.
    """

    def __init__(self, draw: Callable[[], np.ndarray], size: Callable[[], Size] | None = None):
        self.draw, self.size = draw, size

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
