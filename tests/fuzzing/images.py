"""Images: mutated files, odd sizes and modes, through decoding, every image processor and `Processor`."""

from __future__ import annotations

import io
import random
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
from PIL import Image

from fuzzing import _faults as faults

KINDS = {
    "CLIP": dict(image_processor_type="CLIPImageProcessor", size={"shortest_edge": 32}, crop_size=32),
    "CLIP, no resizing": dict(image_processor_type="CLIPImageProcessor", do_resize=False, crop_size=40),
    "Bit": dict(image_processor_type="BitImageProcessor", size={"shortest_edge": 32}, crop_size=28),
    "ViT": dict(image_processor_type="ViTImageProcessor", size=32),
    "SigLIP": dict(image_processor_type="SiglipImageProcessor", size={"height": 32, "width": 24}),
    "SigLIP, shortest edge": dict(image_processor_type="SiglipImageProcessor", size=31),
    "BLIP": dict(image_processor_type="BlipImageProcessor", size={"height": 32, "width": 32}),
    "LLaVA": dict(image_processor_type="LlavaImageProcessor", size=32, crop_size=32, do_pad=True),
    "LLaVA-NeXT": dict(
        image_processor_type="LlavaNextImageProcessor", size={"shortest_edge": 32}, crop_size=32,
        image_grid_pinpoints=[[32, 64], [64, 32], [64, 64], [96, 32]],
    ),
    "OneVision": dict(
        image_processor_type="LlavaOnevisionImageProcessor", size={"height": 32, "width": 32},
        image_grid_pinpoints=[[32 * r, 32 * c] for r in range(1, 4) for c in range(1, 4)],
    ),
    "OneVision, frames": dict(image_processor_type="LlavaOnevisionVideoProcessor", size={"height": 32, "width": 32}),
    "GotOcr2": dict(image_processor_type="GotOcr2ImageProcessor", size={"height": 32, "width": 32}, max_patches=6),
    "InternVL": dict(
        image_processor_type="GotOcr2ImageProcessor", size={"height": 32, "width": 32}, crop_to_patches=True
    ),
    "InternVL, frames": dict(image_processor_type="InternVLVideoProcessor", size={"height": 32, "width": 32}),
    "DeepSeek": dict(image_processor_type="DeepseekVLImageProcessor", size={"height": 32, "width": 32}),
    "DeepSeek, hybrid": dict(
        image_processor_type="DeepseekVLHybridImageProcessor", size={"height": 32, "width": 32}, high_res_size=64
    ),
    "Qwen2-VL": dict(image_processor_type="Qwen2VLImageProcessor", min_pixels=28 * 28, max_pixels=28 * 28 * 16),
}  # fmt: skip
FORMATS = ("PNG", "JPEG", "GIF", "WEBP", "BMP", "TIFF", "PPM")
MODES = ("1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "I;16", "I", "F", "YCbCr", "HSV", "LAB", "PA", "La", "RGBX")
SIDES = (1, 2, 3, 7, 8, 13, 28, 33, 64, 150)
LONG = (999, 2_000, 65_000)


def cases(rng: Any, n: int) -> Iterator[tuple[str, Callable[[], object]]]:
    rng = random.Random(rng.random())
    files = [_file(rng) for _ in range(40)]
    _processor(KINDS["CLIP"])  # its imports are not part of a case
    with tempfile.TemporaryDirectory() as temporary:
        for number in range(n):
            what, case = rng.choice((_decoded, _decoded, _sized, _sized, _of_pillow, _read, _configured, _together))(
                rng, files, Path(temporary)
            )
            yield f"{number} {what}", case


def _file(rng: random.Random) -> tuple[str, bytes]:
    """Returns a valid file of some format and mode, and its name."""
    while True:
        form, mode, size = rng.choice(FORMATS), rng.choice(MODES), (rng.choice(SIDES), rng.choice(SIDES))
        stream = io.BytesIO()
        options = {"compression": rng.choice(("tiff_lzw", "tiff_deflate", "packbits"))} if form == "TIFF" else {}
        try:
            _image(rng, mode, size).save(stream, form, **options)
        except (OSError, ValueError, KeyError):  # a format without this mode
            continue
        return f"{form} {mode} {size}", stream.getvalue()


def _image(rng: random.Random, mode: str, size: tuple[int, int]) -> Image.Image:
    samples = np.frombuffer(rng.randbytes(size[0] * size[1] * 3), np.uint8).reshape(size[1], size[0], 3)
    image = Image.fromarray(samples)
    if mode in ("PA", "La", "I;16", "LAB", "HSV"):
        return Image.new(mode, size)
    return image.convert(mode)


def _decoded(rng: random.Random, files: list, folder: Path) -> tuple[str, Callable]:
    """Decodes and processes a mutated file."""
    name, content = rng.choice(files)
    content, kind = faults.data(rng, content), rng.choice(list(KINDS))
    return f"{name} for {kind}", lambda: _process(kind, _decode(content))


def _sized(rng: random.Random, files: list, folder: Path) -> tuple[str, Callable]:
    """Processes an array of an odd size."""
    long, kind = rng.choice(SIDES + LONG), rng.choice(list(KINDS))
    short = rng.choice(SIDES[:2] if long in LONG else SIDES[:4])
    size = rng.choice(((short, long), (long, short)))
    return f"{size} for {kind}", lambda: _process(kind, np.zeros((*size, 3), np.uint8))


def _of_pillow(rng: random.Random, files: list, folder: Path) -> tuple[str, Callable]:
    """Processes a Pillow image in any mode, or a damaged file that Pillow has opened but not read."""
    from mllm_jax.data.images import as_image

    if rng.random() < 0.5:
        mode, size = rng.choice(MODES), (rng.choice(SIDES), rng.choice(SIDES))
        return f"Pillow's {mode} {size}", lambda: as_image(_image(rng, mode, size))
    name, content = rng.choice(files)
    content = faults.data(rng, content)
    try:
        opened = Image.open(io.BytesIO(content))
    except Exception:  # Pillow's own error, before there is an image
        return f"{name}, as bytes", lambda: as_image(content)
    return f"{name}, opened", lambda: as_image(opened)


def _read(rng: random.Random, files: list, folder: Path) -> tuple[str, Callable]:
    """Reads a file by its name, which may be invalid."""
    from mllm_jax.data.images import read_image

    name, content = rng.choice(files)
    path = folder / "x.png"
    path.write_bytes(faults.data(rng, content))
    given = rng.choice(
        (path, path, str(path), folder, "/dev/zero", "a\0b.png", "\ud800.png", str(folder / ("x" * 300)), "")
    )
    return f"{name} at {given!a:.60}", lambda: read_image(given)


def _configured(rng: random.Random, files: list, folder: Path) -> tuple[str, Callable]:
    """Processes an image with a mutated preprocessor_config.json."""
    from mllm_jax.data.image_processors import image_processor

    settings = faults.values(rng, KINDS[rng.choice(list(KINDS))])
    size = (rng.choice(SIDES), rng.choice(SIDES))

    def case():
        _process_with(image_processor(settings), np.zeros((*size, 3), np.uint8))

    return f"{settings!a:.300} for {size}", case


def _together(rng: random.Random, files: list, folder: Path) -> tuple[str, Callable]:
    """Processes images and videos of several kinds in one call of `Processor`."""
    things = [rng.choice(files)[1] for _ in range(rng.randrange(3))]
    things = [faults.data(rng, thing) if rng.random() < 0.3 else thing for thing in things]
    things += rng.choice(([], [np.zeros((rng.choice(LONG), 1, 3), np.uint8)], [7], [None], [np.zeros((2, 2))]))
    frames = [np.zeros((rng.choice(SIDES), 9, 3), np.uint8)] * rng.randrange(3)
    kind = rng.choice(("LLaVA", "CLIP", "OneVision", "InternVL"))
    text = "a " + "<image> " * (len(things) + rng.choice((0, 0, 0, 1, -1))) + "<video>" * bool(frames)

    def case():
        from mllm_jax import Video

        _processor(KINDS[kind])(text, images=things, videos=[Video(frames, fps=1)] if frames else None)

    return f"{len(things)} images and {len(frames)} frames for {kind}", case


def _decode(content: bytes) -> np.ndarray:
    from mllm_jax.data.images import decode_image

    return decode_image(content, what="the image")


def _process(kind: str, image: np.ndarray) -> None:
    from mllm_jax.data.image_processors import image_processor

    _process_with(image_processor(KINDS[kind]), image)


def _process_with(processor: Any, image: np.ndarray) -> None:
    from mllm_jax.errors import DataError

    for read in (processor, processor.tiles, *([processor.patches] if processor.patch_size else [])):
        try:
            read(image)
        except DataError:
            continue
    if processor.low is not None:
        processor.low(image)


def _processor(settings: dict) -> Any:
    """Returns a processor of a model with tiles and frames, without the model."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    from mllm_jax.data.chat_tokenizer import ChatTokenizer
    from mllm_jax.data.image_processors import image_processor
    from mllm_jax.data.processing.layouts import TileLayout
    from mllm_jax.data.processing.media import PreparedMedia
    from mllm_jax.data.video import FrameTimes
    from mllm_jax.models.processor import Processor

    read = image_processor(settings)

    class Tiles(TileLayout):
        image_token, video_token, tokens_a_tile = 1, 2, 1
        image_processor = frames = read

        def image(self, image: np.ndarray) -> PreparedMedia:
            tiles = self.image_processor.tiles(image)
            return PreparedMedia({"images": tiles}, np.full(len(tiles), 1), np.arange(len(tiles)))

        def video(self, frames: np.ndarray, times: FrameTimes) -> PreparedMedia:
            tiles = np.stack([self.frames.prepare(frame) for frame in frames])
            return PreparedMedia({"images": tiles}, np.full(len(tiles), 2), np.arange(len(tiles)))

    backend = Tokenizer(models.WordLevel({"a": 0, "<image>": 1, "<video>": 2}, unk_token="a"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = ChatTokenizer(PreTrainedTokenizerFast(tokenizer_object=backend))
    return Processor(SimpleNamespace(encoder_decoder=False, batch_spec=_batch_spec), tokenizer, Tiles())


def _batch_spec(rows: int = 1, length: int = 8, slots: Any = None) -> Any:
    from mllm_jax.data.batch import images_spec, text_spec

    return text_spec(rows, length) | images_spec(rows, (slots or {}).get("image", 0), 32)
