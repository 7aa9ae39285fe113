"""Media laid out by their sizes alone: the positions, slots and refusals of their pixels, for every layout."""

from __future__ import annotations

import io
from dataclasses import replace

import numpy as np
import pytest
from PIL import ExifTags
from PIL import Image as Pillow
from PIL.PngImagePlugin import PngInfo

from mllm_jax.data.image_steps import ImageProcessor
from mllm_jax.data.images import Drawn, Size, decode_image, image_size
from mllm_jax.data.message import Example, Image, Message, Text, Video
from mllm_jax.data.processing.composed import ComposedLayout, ImageTokens
from mllm_jax.data.processing.layouts import Layout
from mllm_jax.data.processing.media import PreparedMedia
from mllm_jax.data.source_encoder import without_pixels
from mllm_jax.encoders.qwen_vit import QwenViTConfig
from mllm_jax.encoders.vit import ViTConfig, ViTDialect
from mllm_jax.errors import DataError
from mllm_jax.llms.decoder import DecoderConfig
from mllm_jax.models.branch import Branch
from mllm_jax.models.llava import NEXT, ONEVISION, LlavaConfig, LlavaLayout
from mllm_jax.models.multimodal import Connection
from mllm_jax.models.qwen_vl import QwenVLConfig, QwenVLLayout
from mllm_jax.projectors.mlp import MLPProjectorConfig

SIDE = 12
TOWER = ViTConfig(
    SIDE, 4, 24, num_layers=1, num_heads=2, mlp_size=32, class_token=True, dialect=ViTDialect(norm_output=False)
)
LLAVA = LlavaConfig(
    inputs={"image": Branch(TOWER, MLPProjectorConfig(output_size=32), Connection(layers=(-1,)))},
    llm=DecoderConfig(vocab_size=20, hidden_size=32, num_layers=1, num_heads=4, mlp_size=40),
)
RESOLUTIONS = ((SIDE, 2 * SIDE), (2 * SIDE, 2 * SIDE), (3 * SIDE, SIDE))
CLIP = ImageProcessor("CLIPImageProcessor", shortest_edge=SIDE, crop_size=(SIDE, SIDE))
TILES = replace(CLIP, kind="LlavaNextImageProcessor", resolutions=RESOLUTIONS, tile_size=SIDE)
PATCHES = ImageProcessor(
    "Qwen2VLImageProcessor", pixel_range=(64, 4096), patch_size=4, merge_size=2, temporal_patch_size=2
)


def tiled(family: str, **change) -> LlavaConfig:
    return replace(LLAVA, family=family, newline=True, resolutions=RESOLUTIONS, **change)


class Own(Layout):
    """A layout with the default methods for sizes."""

    image_token = 1

    def image(self, image: np.ndarray) -> PreparedMedia:
        count = image.shape[0] // 4 + 1
        return PreparedMedia({"images": np.zeros((count, 2, 2, 3))}, np.full(count, 1), np.arange(count))


def layouts() -> dict[str, Layout]:
    squares = replace(CLIP, size=(SIDE, SIDE), shortest_edge=None, crop_size=None)
    one_vision = tiled(ONEVISION, max_tiles=2, video_token_id=9)
    return {
        "LLaVA-1.5": LlavaLayout(LLAVA, CLIP),
        "LLaVA-1.5, padded": LlavaLayout(replace(LLAVA, preprocessing="original"), replace(CLIP, mean=(0.5,) * 3)),
        "LLaVA-NeXT": LlavaLayout(tiled(NEXT), TILES),
        "LLaVA-OneVision": LlavaLayout(one_vision, replace(squares, resolutions=RESOLUTIONS, tile_size=SIDE), squares),
        "own": Own(),
        "plain": ComposedLayout({"image": ImageTokens(SIDE, 4)}, 3),
    }


SIZES = ((12, 12), (7, 40), (40, 7), (30, 31), (100, 64), (1, 3))


def same(found: PreparedMedia, pixels: PreparedMedia) -> None:
    assert found.slots == pixels.slots and found.modality == pixels.modality
    assert (found.grid, found.seconds) == (pixels.grid, pixels.seconds)
    np.testing.assert_array_equal(found.tokens, pixels.tokens)
    np.testing.assert_array_equal(found.places, pixels.places)
    assert (found.weights is None) == (pixels.weights is None)
    if found.weights is not None:
        np.testing.assert_array_equal(found.weights, pixels.weights)


def compare(layout: Layout, parts: list) -> None:
    example = without_pixels(Example((Message("user", tuple(parts)),)))
    for found, pixels in zip(layout.prepare(example.media), layout.prepare(parts), strict=True):
        same(found, pixels)
        assert isinstance(layout, ComposedLayout) or not found.arrays


@pytest.mark.parametrize("name", layouts())
def test_sizes_say_what_pixels_take(name):
    layout = layouts()[name]
    images = [Image(np.zeros((*size, 3), np.uint8)) for size in SIZES]
    for image in images:
        compare(layout, [image])
    compare(layout, images[:3])
    if layout.video_token is not None:
        compare(layout, [images[1], Video(np.zeros((3, 20, 30, 3), np.uint8), fps=2)])


def test_sizes_say_what_patches_are(qwen):
    for size in SIZES[:5]:
        compare(qwen, [Image(np.zeros((*size, 3), np.uint8))])
    compare(qwen, [Image(np.zeros((9, 12, 3), np.uint8)), Video(np.zeros((3, 20, 30, 3), np.uint8), fps=2)])


@pytest.fixture
def qwen() -> QwenVLLayout:
    layout = QwenVLLayout.__new__(QwenVLLayout)
    layout.config = QwenVLConfig.__new__(QwenVLConfig)
    object.__setattr__(layout.config, "inputs", {"image": Branch(QwenViTConfig())})
    object.__setattr__(layout.config, "llm", LLAVA.llm)
    layout.image_processor, layout.image_token, layout.video_token = PATCHES, 1, 2
    return layout


@pytest.mark.parametrize("name", ["LLaVA-1.5", "LLaVA-NeXT"])
def test_sizes_are_refused_as_pixels_are(name):
    """Checks a long, thin image that would become too large: it is refused before it is processed."""
    layout, thin = layouts()[name], Size(2, 45_000)
    layout.image_processor = replace(layout.image_processor, shortest_edge=5000)
    with pytest.raises(DataError) as by_size:
        layout.prepare([Image(thin)])
    with pytest.raises(DataError) as by_pixels:
        layout.prepare([Image(np.zeros((*thin, 3), np.uint8))])
    assert str(by_size.value) == str(by_pixels.value)


def test_an_example_keeps_its_texts():
    example = Example((Message("user", (Image(np.zeros((2, 3, 3), np.uint8)), Text("a"))), Message("assistant", "b")))
    found = without_pixels(example)
    assert found.messages[1] == example.messages[1] and found.messages[0].parts[1] == Text("a")
    assert found.messages[0].parts[0].source == Size(2, 3)


# ---- headers


def encoded(kind: str, mode: str = "RGB", **how) -> bytes:
    file = io.BytesIO()
    Pillow.new(mode, (7, 4)).save(file, kind, **how)
    return file.getvalue()


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "PPM"])
def test_headers_say_the_size_that_decoding_gives(kind, tmp_path, monkeypatch):
    data = [encoded(kind)]
    if kind in ("PNG", "JPEG", "WEBP", "TIFF"):
        for turned in range(1, 9):
            exif = Pillow.Exif()
            exif[ExifTags.Base.Orientation] = turned
            data.append(encoded(kind, exif=exif))
    shapes = [decode_image(each, what="it").shape[:2] for each in data]
    assert len(data) == 1 or set(shapes) == {(4, 7), (7, 4)}
    for number, (each, shape) in enumerate(zip(data, shapes, strict=True)):
        if kind != "TIFF" or number < 5:  # Pillow's versions disagree on a rotated TIFF
            monkeypatch.setattr(Pillow.Image, "load", lambda self: pytest.fail("decoded"))
        (tmp_path / "image").write_bytes(each)
        assert image_size(each) == image_size(tmp_path / "image") == shape
        monkeypatch.undo()


def test_a_png_that_is_turned_after_its_pixels():
    exif = Pillow.Exif()
    exif[ExifTags.Base.Orientation] = 6
    turned, plain = encoded("PNG", exif=exif), encoded("PNG", pnginfo=PngInfo())
    start = turned.index(b"eXIf") - 4
    chunk = turned[start : start + 12 + int.from_bytes(turned[start : start + 4], "big")]
    late = plain[:-12] + chunk + plain[-12:]
    assert decode_image(late, what="it").shape[:2] == (7, 4) == image_size(late)


def test_sizes_of_other_forms():
    drawn = Drawn(lambda: np.zeros((2, 5, 3), np.uint8))
    assert (
        image_size(drawn) == image_size(np.zeros((2, 5, 3), np.uint8)) == image_size(Pillow.new("L", (5, 2))) == (2, 5)
    )
    assert image_size(Drawn(lambda: pytest.fail("drawn"), lambda: Size(3, 4))) == (3, 4)


@pytest.mark.parametrize("data", [b"", b"no image", encoded("PNG")[:20]], ids=["empty", "text", "cut"])
def test_what_has_no_header_is_refused_as_when_it_is_decoded(data, tmp_path):
    for read in (image_size, lambda each: decode_image(each, what="an image")):
        with pytest.raises(DataError, match="an image: cannot be decoded"):
            read(data)
    with pytest.raises(DataError, match="cannot be read"):
        image_size(tmp_path / "none.png")
