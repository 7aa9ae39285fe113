"""Images of every mode are decoded as a person sees them; hostile ones are refused with a reason."""

from __future__ import annotations

import io
import os
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from mllm_jax.data.images import FORMATS, MAX_PIXELS, as_image, decode_image, read_image, resize
from mllm_jax.errors import DataError


def encode(image: Image.Image, kind: str = "PNG", **options) -> bytes:
    stream = io.BytesIO()
    image.save(stream, kind, **options)
    return stream.getvalue()


def pixel(data: bytes) -> list[int]:
    image = decode_image(data, what="test")
    assert image.dtype == np.uint8 and image.ndim == 3 and image.shape[2] == 3
    return image[0, 0].tolist()


def chunk(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def png(width: int, height: int, bits: int, colour: int, row: bytes, *extra: bytes) -> bytes:
    """Returns a PNG with equal rows, of kinds that Pillow reads but does not write."""
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, bits, colour, 0, 0, 0))
    body = chunk(b"IDAT", zlib.compress((b"\0" + row) * height))
    return b"\x89PNG\r\n\x1a\n" + header + b"".join(extra) + body + chunk(b"IEND", b"")


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


@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
def test_sixteen_bits_in_every_layout(kind):
    """Checks that a 16-bit sample keeps its high byte, and that transparent pixels become white."""
    assert pixel(encode(Image.fromarray(np.full((2, 3), 0xFE01, np.uint16)), kind)) == [254] * 3
    samples = struct.pack(">3H", 0x12FF, 0x80FF, 0xFE00)
    assert pixel(png(1, 1, 16, 2, samples)) == [0x12, 0x80, 0xFE]
    assert pixel(png(1, 1, 16, 6, samples + b"\xff\xff")) == [0x12, 0x80, 0xFE]
    assert pixel(png(1, 1, 16, 6, samples + b"\0\0")) == [255] * 3
    assert pixel(png(1, 1, 16, 4, samples[:2] + b"\xff\xff")) == [0x12] * 3
    assert pixel(png(1, 1, 16, 4, samples[:2] + b"\0\0")) == [255] * 3
    clear = chunk(b"tRNS", samples[:2])
    grey = decode_image(png(2, 1, 16, 0, samples[:2] + b"\x12\x00", clear), what="test")
    assert grey[0, :, 0].tolist() == [255, 0x12], "one value is transparent, not all with its high byte"


def test_grey_images_keep_their_levels():
    ramp = np.arange(256, dtype=np.uint8)[None].repeat(2, axis=0)
    for kind in ("PNG", "BMP", "TIFF", "PPM"):
        assert (decode_image(encode(Image.fromarray(ramp), kind), what="test") == ramp[..., None]).all()


def test_palettes_with_an_opacity_of_each_entry():
    palette = Image.new("P", (3, 1))
    palette.putpalette([0, 0, 0, 0, 0, 0, 10, 20, 30])
    palette.putdata([0, 1, 2])
    data = encode(palette, transparency=bytes([0, 127, 255]))
    assert decode_image(data, what="test")[0].tolist() == [[255] * 3, [128] * 3, [10, 20, 30]]


@pytest.mark.parametrize("kind", ["GIF", "WEBP", "PNG", "TIFF"])
def test_of_an_animation_the_first_frame_is_taken(kind):
    colours = ((200, 0, 0), (0, 200, 0), (0, 0, 200))
    first, *others = [Image.new("RGB", (5, 4), colour) for colour in colours]
    options = dict(save_all=True, append_images=others) | (dict(lossless=True) if kind == "WEBP" else {})
    data = encode(first, kind, **options)
    assert Image.open(io.BytesIO(data)).n_frames == 3
    assert (decode_image(data, what="test") == colours[0]).all()
    assert decode_image(data, what="test").shape == (4, 5, 3)


def test_a_clear_first_frame_lies_on_white():
    frames = [Image.new("RGBA", (4, 4), (0, 0, 0, 0)), Image.new("RGBA", (4, 4), (9, 9, 9, 255))]
    assert (decode_image(encode(frames[0], "GIF", save_all=True, append_images=frames[1:]), what="test") == 255).all()


@pytest.mark.parametrize("kind", ["JPEG", "TIFF"])
def test_cmyk_ink_darkens(kind):
    """Checks also JPEG files, which many programs write with inverted samples."""
    for ink, colour in (((0, 0, 0, 0), 255), ((0, 0, 0, 255), 0), ((255, 255, 255, 0), 0)):
        found = np.array(pixel(encode(Image.new("CMYK", (8, 8), ink), kind)), int)
        assert np.abs(found - colour).max() < 12, ink


def test_cmyk_becomes_rgb():
    red, green, blue = pixel(encode(Image.new("CMYK", (8, 8), (0, 255, 255, 0)), "JPEG", quality=95))
    assert red > 240 and green < 20 and blue < 20


def test_exif_orientation_is_applied():
    image = Image.new("RGB", (4, 2), "white")
    image.putpixel((0, 0), (0, 0, 0))
    exif = Image.Exif()
    exif[0x0112] = 6  # turn a quarter clockwise for display
    turned = decode_image(encode(image, exif=exif.tobytes()), what="test")
    assert turned.shape == (4, 2, 3)
    assert turned[0, 1].tolist() == [0, 0, 0] and turned[0, 0].tolist() == [255, 255, 255]


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF"])
def test_every_exif_orientation_is_turned_upright(kind):
    upright = np.zeros((16, 24, 3), np.uint8)
    upright[:8, :8], upright[8:, :8], upright[:8, 16:] = (250, 0, 0), (0, 250, 0), (0, 0, 250)
    turned = {  # as the camera stores it
        1: upright,
        2: upright[:, ::-1],
        3: upright[::-1, ::-1],
        4: upright[::-1],
        5: upright.transpose(1, 0, 2),
        6: np.rot90(upright),
        7: upright.transpose(1, 0, 2)[::-1, ::-1],
        8: np.rot90(upright, -1),
    }
    for orientation, stored in turned.items():
        exif = Image.Exif()
        exif[0x0112] = orientation
        options = dict(quality=95) if kind == "JPEG" else dict(lossless=True) if kind == "WEBP" else {}
        data = encode(Image.fromarray(np.ascontiguousarray(stored)), kind, exif=exif, **options)
        found = decode_image(data, what="test").astype(int)
        assert found.shape == upright.shape, orientation
        # JPEG mixes colours near edges, so compare the middles of the corners.
        assert np.abs(found[4::8, 4::8] - upright[4::8, 4::8]).max() < 40, orientation


def test_an_image_of_100_megapixels_is_refused_from_its_header():
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


@pytest.mark.parametrize("kind", FORMATS)
def test_truncated_images_are_refused(kind):
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
    data = encode(Image.fromarray(noise), kind)
    assert decode_image(data, what="test").shape == (64, 64, 3)
    for kept in (0.02, 0.5, 0.97):
        with pytest.raises(DataError, match="record 3: cannot be decoded"):
            decode_image(data[: int(len(data) * kept)], what="record 3")


@pytest.mark.parametrize("size", [(0, 1), (1, 0), (0, 0)])
def test_images_without_pixels_are_refused(size):
    jpeg = bytearray(encode(Image.new("RGB", (3, 2)), "JPEG"))
    start = jpeg.index(b"\xff\xc0")
    jpeg[start + 5 : start + 9] = struct.pack(">HH", *size)
    bitmap = bytearray(encode(Image.new("RGB", (3, 2)), "BMP"))
    bitmap[18:26] = struct.pack("<II", *size)
    plain = b"P6 %d %d 255\n" % size
    for data in (png(*size, 8, 2, bytes(3 * size[0])), bytes(jpeg), bytes(bitmap), plain):
        with pytest.raises(DataError, match="record 5: cannot be decoded.*without pixels"):
            decode_image(data, what="record 5")


@pytest.mark.parametrize("data", [b"", b"not an image", b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n"])
def test_what_is_no_image_is_refused(data):
    with pytest.raises(DataError, match="cannot be decoded"):
        decode_image(data, what="test")


def test_floating_point_images_are_refused():
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
    bad.write_bytes(b"no image")
    assert read_image(good).tolist() == [[[1, 2, 3]] * 3] * 2
    with pytest.raises(DataError, match="bad.png: cannot be decoded"):
        read_image(bad)
    with pytest.raises(DataError, match=r"missing.png cannot be read \(FileNotFoundError"):
        read_image(tmp_path / "missing.png")
    with pytest.raises(DataError, match="IsADirectoryError"):
        read_image(tmp_path)


def test_only_regular_files_of_bounded_size_are_read(tmp_path):
    """Checks pipes, which would block, and devices and sparse files, which would fill the memory."""
    os.mkfifo(tmp_path / "pipe.png")
    with open(tmp_path / "sparse.png", "wb") as file:
        file.truncate(100 << 30)
    refused = {
        tmp_path / "pipe.png": "not a regular file",
        "/dev/zero": "not a regular file",
        tmp_path / "sparse.png": "107,374,182,400 bytes",
        str(tmp_path / "a\0.png"): "null",
        str(tmp_path / "\ud800.png"): "surrogates",
        tmp_path: "cannot be read",
        str(tmp_path / ("x" * 5_000)): "cannot be read",
    }
    for path, message in refused.items():
        for read in (read_image, as_image):
            with pytest.raises(DataError, match=message) as refusal:
                read(path)
            str(refusal.value).encode()


def test_pillows_images_are_finished_or_refused():
    whole = encode(Image.new("RGB", (64, 64), (1, 2, 3)))
    assert as_image(Image.open(io.BytesIO(whole))).shape == (64, 64, 3)
    for image in (Image.new("F", (3, 2), 0.5), Image.open(io.BytesIO(whole[:70]))):
        with pytest.raises(DataError, match="a Pillow image: cannot be decoded"):
            as_image(image)
