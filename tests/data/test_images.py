"""Pictures of every mode come out as a person sees them, and hostile ones are refused with a reason."""

from __future__ import annotations

import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from mllm_jax.data.images import MAX_PIXELS, decode_image, read_image, resize
from mllm_jax.errors import DataError


def encode(image: Image.Image, kind: str = "PNG", **options) -> bytes:
    stream = io.BytesIO()
    image.save(stream, kind, **options)
    return stream.getvalue()


def pixel(data: bytes) -> list[int]:
    image = decode_image(data, what="test")
    assert image.dtype == np.uint8 and image.ndim == 3 and image.shape[2] == 3
    return image[0, 0].tolist()


def test_grey_palette_and_bilevel_become_rgb():
    assert pixel(encode(Image.new("L", (3, 2), 77))) == [77, 77, 77]
    assert pixel(encode(Image.new("1", (3, 2), 1))) == [255, 255, 255]
    assert pixel(encode(Image.new("RGB", (3, 2), (9, 80, 200)).quantize(4))) == [9, 80, 200]


def test_transparency_lies_on_white():
    assert pixel(encode(Image.new("RGBA", (3, 2), (0, 0, 0, 0)))) == [255, 255, 255]
    assert pixel(encode(Image.new("RGBA", (3, 2), (0, 0, 0, 127)))) == [128, 128, 128]
    assert pixel(encode(Image.new("LA", (3, 2), (0, 0)))) == [255, 255, 255]
    palette = Image.new("P", (3, 2), 0)
    palette.putpalette([10, 20, 30])
    assert pixel(encode(palette, transparency=0)) == [255, 255, 255]
    assert pixel(encode(Image.new("RGB", (3, 2), (5, 6, 7)), transparency=(5, 6, 7))) == [255, 255, 255]


def test_sixteen_bits_keep_their_high_byte():
    data = encode(Image.fromarray(np.full((2, 3), 0x80FF, np.uint16)))
    assert pixel(data) == [128, 128, 128]


def test_cmyk_becomes_rgb():
    red, green, blue = pixel(encode(Image.new("CMYK", (8, 8), (0, 255, 255, 0)), "JPEG", quality=95))
    assert red > 240 and green < 20 and blue < 20


def test_exif_orientation_is_applied():
    image = Image.new("RGB", (4, 2), "white")
    image.putpixel((0, 0), (0, 0, 0))
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned a quarter clockwise for display
    turned = decode_image(encode(image, exif=exif.tobytes()), what="test")
    assert turned.shape == (4, 2, 3)
    assert turned[0, 1].tolist() == [0, 0, 0] and turned[0, 0].tolist() == [255, 255, 255]


def test_a_picture_of_100_megapixels_is_refused_from_its_header():
    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", 10_000, 10_000, 8, 2, 0, 0, 0))
    data = b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", b"") + chunk(b"IEND", b"")
    with pytest.raises(DataError, match=r"(?s)record 7.*10000 x 10000.*50,000,000"):
        decode_image(data, what="record 7")
    huge = data.replace(header, chunk(b"IHDR", struct.pack(">IIBBBBB", 100_000, 100_000, 8, 2, 0, 0, 0)))
    with pytest.raises(DataError, match="50,000,000"):
        decode_image(huge, what="record 7")


def test_the_bound_itself_is_allowed():
    side = int(MAX_PIXELS**0.5)
    assert decode_image(encode(Image.new("1", (side, side))), what="test").shape == (side, side, 3)


@pytest.mark.parametrize("kind", ["PNG", "JPEG"])
def test_truncated_pictures_are_refused(kind):
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
    data = encode(Image.fromarray(noise), kind)
    assert decode_image(data, what="test").shape == (64, 64, 3)
    with pytest.raises(DataError, match="record 3"):
        decode_image(data[: len(data) // 2], what="record 3")


@pytest.mark.parametrize("data", [b"", b"not a picture", b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n"])
def test_what_is_no_picture_is_refused(data):
    with pytest.raises(DataError, match="cannot be decoded"):
        decode_image(data, what="test")


def test_floating_point_pictures_are_refused():
    with pytest.raises(DataError, match="floating point"):
        decode_image(encode(Image.new("F", (3, 2), 0.5), "TIFF"), what="test")


def test_resize_averages_whole_blocks():
    image = np.zeros((4, 4, 3), np.uint8)
    image[:2, :2] = 100
    assert resize(image, 2)[:, :, 0].tolist() == [[100, 0], [0, 0]]
    assert resize(image, (2, 1))[:, :, 0].tolist() == [[50], [0]]


def test_resize_keeps_flat_colour_and_returns_a_fresh_array():
    image = np.full((10, 7, 3), (1, 128, 255), np.uint8)
    assert (resize(image, (5, 13)) == image[0, 0]).all()
    same = resize(image, (10, 7))
    same[:] = 0
    assert image[0, 0].tolist() == [1, 128, 255]


def test_files_are_read_and_named_when_they_cannot_be(tmp_path):
    good, bad = tmp_path / "good.png", tmp_path / "bad.png"
    good.write_bytes(encode(Image.new("RGB", (3, 2), (1, 2, 3))))
    bad.write_bytes(b"no picture")
    assert read_image(good).tolist() == [[[1, 2, 3]] * 3] * 2
    with pytest.raises(DataError, match="bad.png: cannot be decoded"):
        read_image(bad)
    with pytest.raises(DataError, match=r"missing.png cannot be read \(FileNotFoundError"):
        read_image(tmp_path / "missing.png")
    with pytest.raises(DataError, match="IsADirectoryError"):
        read_image(tmp_path)
