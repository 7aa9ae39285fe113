"""Tiles of images equal those of transformers' processors to the last byte; resolutions and positions by hand."""

from __future__ import annotations

import json
from importlib import import_module

import numpy as np
import pytest
from einops import rearrange
from transformers.image_processing_utils import get_patch_output_size, select_best_resolution

from mllm_jax.data.image_processors import image_processor, read_image_processor, read_video_processor
from mllm_jax.data.processing.media import NEWLINE
from mllm_jax.data.tiles import (
    anyres_places,
    best_resolution,
    fitted_size,
    pad_to,
    resized,
    tile_places,
    unpadded,
    video_places,
)
from mllm_jax.errors import ConfigError, DataError

NEXT = ((336, 672), (672, 336), (672, 672), (1008, 336), (336, 1008))
SMALL = [[16, 32], [32, 16], [32, 32], [48, 16], [16, 48]]
SIZES = ((48, 48), (37, 90), (91, 38), (20, 33), (1, 7), (120, 3), (16, 32), (5, 200))
CASES = {
    "llava": ("llava.Llava", {}),
    "llava, the original's square": ("llava.Llava", dict(do_pad=True, size=dict(shortest_edge=45), crop_size=45)),
    "llava, a square and a smaller crop": (
        "llava.Llava",
        dict(do_pad=True, size=36, crop_size=30, image_mean=[0.9] * 3),
    ),
    "llava, square alone": ("llava.Llava", dict(do_pad=True, do_resize=False, do_center_crop=False)),
    "next": ("llava_next.LlavaNext", dict(size=16, crop_size=16, image_grid_pinpoints=SMALL)),
    "next, tiles that are not whole": ("llava_next.LlavaNext", dict(size=20, crop_size=12, image_grid_pinpoints=SMALL)),
    "next, no crop": (
        "llava_next.LlavaNext",
        dict(size=dict(height=16, width=16), crop_size=16, do_center_crop=False, image_grid_pinpoints=SMALL),
    ),
    "next, black beside white": ("llava_next.LlavaNext", dict(size=16, crop_size=16, image_grid_pinpoints=[[16, 64]])),
    "next, unchanged": ("llava_next.LlavaNext", {}),
    "onevision": ("llava_onevision.LlavaOnevision", dict(size=dict(height=16, width=16), image_grid_pinpoints=SMALL)),
    "onevision, unchanged": ("llava_onevision.LlavaOnevision", dict(image_mean=[0.5] * 3, resample=2)),
}


def make_image(height: int, width: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)


@pytest.mark.parametrize("case", CASES)
def test_tiles_to_the_last_byte(case, tmp_path):
    name, options = CASES[case]
    module, prefix = name.split(".")
    pil = import_module(f"transformers.models.{module}.image_processing_pil_{module}")
    reference = getattr(pil, f"{prefix}ImageProcessorPil")(**options)
    reference.save_pretrained(tmp_path)
    ours = read_image_processor(tmp_path)
    assert ours == image_processor(options | {"image_processor_type": ours.kind}), "a file with these options alone"
    sizes = SIZES if "unchanged" not in case else ((300, 500), (11, 700))
    for size in sizes:
        image = make_image(*size)
        wanted = reference(image, return_tensors="np", input_data_format="channels_last")["pixel_values"][0]
        tiles = ours.tiles(image)
        assert tiles.dtype == np.uint8
        found = rearrange(ours.normalise(tiles), "n h w c -> n c h w")
        np.testing.assert_array_equal(found, wanted if wanted.ndim == 4 else wanted[None], err_msg=str(size))


def test_one_of_several_images_is_a_padded_square():
    """Checks that LLaVA-OneVision cuts a single image of a text; several are one tile each."""
    pil = import_module("transformers.models.llava_onevision.image_processing_pil_llava_onevision")
    options = dict(size=dict(height=16, width=16), image_grid_pinpoints=SMALL)
    images = [make_image(*size) for size in SIZES]
    wanted = pil.LlavaOnevisionImageProcessorPil(**options)(
        [images], return_tensors="np", input_data_format="channels_last"
    )
    ours = image_processor(options | {"image_processor_type": "LlavaOnevisionImageProcessor"})
    for image, pixels in zip(images, wanted["pixel_values"], strict=True):
        np.testing.assert_array_equal(rearrange(ours(image), "h w c -> 1 c h w"), pixels)
        assert ours.output_size(*image.shape[:2]) == (16, 16)


def test_frames_of_a_video(tmp_path):
    """Checks all files of settings: a part of processor_config.json, their own file, or the images' file."""
    shared = dict(image_processor_type="LlavaOnevisionImageProcessor", size=dict(height=10, width=10))
    own = dict(video_processor_type="LlavaOnevisionVideoProcessor", size=dict(height=20, width=20))
    inner = dict(video_processor=own | dict(size=dict(height=30, width=30), do_sample_frames=False))
    sides = []
    for name, values in (("preprocessor", shared), ("video_preprocessor", own), ("processor", inner)):
        (tmp_path / f"{name}_config.json").write_text(json.dumps(values), "utf-8")
        found = read_video_processor(tmp_path)
        assert found.tiles(make_image(9, 14)).shape[0] == 1 and found.background is None
        sides.append(found.output_size(9, 14))
    assert sides == [(10, 10), (20, 20), (30, 30)]
    with pytest.raises(ConfigError, match="do_sample_frames=True"):
        image_processor(own | dict(do_sample_frames=True))


def test_resolutions_and_sizes_are_theirs():
    rng = np.random.default_rng(0)
    many = tuple((a, b) for a in range(384, 2305, 384) for b in range(384, 2305, 384))
    sizes = rng.integers(1, 2500, (300, 2)).tolist() + [[336, 672], [1, 5000], [5000, 1], [600, 600], [672, 672]]
    for size in map(tuple, sizes):
        for resolutions in (NEXT, many):
            target = best_resolution(size, resolutions)
            assert target == select_best_resolution(size, resolutions), size
            image = np.broadcast_to(np.uint8(0), (*size, 3))
            assert fitted_size(size, target) == get_patch_output_size(image, target, "channels_last"), size


def test_rounding_keeps_rows_that_cutting_loses():
    """Checks 55 * (48 / 176), which is just below 15 in floating point."""
    assert unpadded((55, 176), (48, 48)) == (slice(16, 32), slice(0, 48))
    assert unpadded((55, 176), (48, 48), rounds=False) == (slice(17, 31), slice(0, 48))


def test_colour_of_a_square():
    square = pad_to(np.full((1, 4, 3), 9, np.uint8), (4, 4), (1, 2, 3))
    assert square[:, :, 1].tolist() == [[2] * 4, [9] * 4, [2] * 4, [2] * 4]
    tall = pad_to(np.full((3, 2, 3), 9, np.uint8), (3, 3), (1, 2, 3))
    assert tall[:, :, 0].tolist() == [[9, 9, 1]] * 3


def test_positions_by_hand():
    n = NEWLINE
    # Two tiles of 2 x 2 side by side; the image is half as high as both. One row of margin above and below would leave
    # nothing of two rows, so an image of a quarter keeps both.
    assert anyres_places((8, 16), (8, 16), 8, 2).places.tolist() == [0, 1, 2, 3, 4, 5, 8, 9, n, 6, 7, 10, 11, n]
    # Four tiles; a wide image fills the two rows in the middle.
    wide = anyres_places((4, 8), (16, 16), 8, 2)
    assert wide.places.tolist() == [0, 1, 2, 3, 6, 7, 10, 11, n, 12, 13, 16, 17, n] and wide.weights is None
    tall = anyres_places((8, 4), (16, 16), 8, 2)
    assert tall.places.tolist() == [0, 1, 2, 3, 5, 8, n, 7, 10, n, 13, 16, n, 15, 18, n]
    assert tile_places(2).places.tolist() == [0, 1, 2, 3, n]
    # Nothing remains of an image that is thinner than a row, but a narrow one keeps the ends of rows.
    assert anyres_places((1, 900), (8, 16), 8, 2).places.tolist() == [0, 1, 2, 3]
    assert anyres_places((900, 1), (16, 8), 8, 2).places.tolist() == [0, 1, 2, 3, n, n, n, n]


def test_sums_of_media_tokens_by_hand():
    halved = video_places(2, 4)
    assert halved.places.shape == (9, 4) and halved.places[-1].tolist() == [NEWLINE] * 4
    assert halved.places[1].tolist() == [2, 3, 6, 7] and halved.weights[1].tolist() == [0.25] * 4
    assert halved.places[4].tolist() == [16, 17, 20, 21] and halved.weights[-1].tolist() == [1, 0, 0, 0]
    reduced = anyres_places((16, 16), (16, 16), 8, 2, max_tiles=1)
    assert reduced.places[:5].tolist() == [[0] * 4, [1] * 4, [2] * 4, [3] * 4, [4, 5, 6, 7]]
    assert (reduced.places == NEWLINE).all(axis=1).tolist() == [False] * 6 + [True, False, False, True]
    np.testing.assert_array_equal(reduced.weights.sum(axis=1), 1)
    odd = resized(np.arange(9).reshape(3, 3), (2, 2))
    np.testing.assert_allclose((odd.weights * odd.places).sum(-1), [[1, 2.5], [5.5, 7]])


def test_what_cannot_be_tiles_is_refused():
    kind = dict(image_processor_type="LlavaNextImageProcessor")
    with pytest.raises(ConfigError, match="do_resize=False"):
        image_processor(kind | dict(do_resize=False))
    with pytest.raises(ConfigError, match="aspect=1"):
        image_processor(kind | dict(aspect=1))
    with pytest.raises(DataError, match="decode_image"):
        image_processor(kind).tiles(np.zeros((4, 4), np.uint8))
