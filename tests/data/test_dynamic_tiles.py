"""InternVL's tiles and DeepSeek-VL's squares equal transformers' processors to the last byte."""

from __future__ import annotations

from importlib import import_module

import numpy as np
import pytest
from einops import rearrange

from mllm_jax.data.image_processors import image_processor, read_image_processor, read_video_processor
from mllm_jax.data.tiles import tile_grid
from mllm_jax.errors import ConfigError

SIZES = ((28, 28), (37, 90), (91, 38), (20, 33), (1, 7), (120, 3), (64, 61), (200, 100), (40, 52))


def make_image(height: int, width: int) -> np.ndarray:
    return np.random.default_rng(height * 1000 + width).integers(0, 256, (height, width, 3), np.uint8)


def theirs(reference, image: np.ndarray, name: str = "pixel_values") -> np.ndarray:
    out = reference(image, return_tensors="np", input_data_format="channels_last")[name]
    return rearrange(out, "n c h w -> n h w c")


# ---- InternVL


@pytest.mark.parametrize("bounds", [(1, 12), (1, 6), (2, 5), (3, 40), (7, 7)])
def test_grids_are_theirs(bounds):
    reference = import_module("transformers.models.got_ocr2.image_processing_pil_got_ocr2").get_optimal_tiled_canvas
    rng, ties = np.random.default_rng(0), [(30, 30), (20, 40), (400, 500), (448, 896), (449, 897), (1344, 448), (5, 4)]
    for size in [*map(tuple, rng.integers(1, 3000, (200, 2)).tolist()), *ties, *((2 * h, 2 * w) for h, w in ties)]:
        for tile in ((448, 448), (20, 30)):
            columns, rows = reference(size, tile, *bounds)
            assert tile_grid(size, tile, *bounds) == (rows, columns), (size, tile)


@pytest.mark.parametrize(
    "options", [{}, dict(max_patches=5, min_patches=2), dict(max_patches=1), dict(resample=2, do_normalize=False)]
)
def test_tiles_to_the_last_bit(options, tmp_path):
    kind = import_module("transformers.models.got_ocr2.image_processing_pil_got_ocr2").GotOcr2ImageProcessorPil
    reference = kind(crop_to_patches=True, size=dict(height=28, width=28), **options)
    reference.save_pretrained(tmp_path)
    ours = read_image_processor(tmp_path)
    lengths = set()
    for size in SIZES:
        wanted = theirs(reference, make_image(*size))
        tiles = ours.tiles(make_image(*size))
        assert tiles.dtype == np.uint8
        np.testing.assert_array_equal(ours.normalise(tiles), wanted, err_msg=str(size))
        lengths.add(len(tiles))
    assert len(lengths) > 2 or options.get("max_patches") == 1
    # As in transformers' processor of the whole model: it always cuts images, and never frames of videos.
    kind(crop_to_patches=False, size=dict(height=28, width=28), **options).save_pretrained(tmp_path)
    assert read_image_processor(tmp_path, crop_to_patches=True) == ours
    assert len(read_image_processor(tmp_path).tiles(make_image(28, 80))) == 1
    assert len(read_video_processor(tmp_path).tiles(make_image(28, 80))) == 1


# ---- DeepSeek-VL

SQUARES = {
    "1.3b": dict(size=dict(height=40, width=40), image_mean=[0.5] * 3, image_std=[0.5] * 3),
    "least side": dict(size=dict(height=40, width=40), min_size=30, resample=2),
    "no resizing": dict(do_resize=False),
    "no margins": dict(size=dict(height=33, width=33), do_pad=False, do_rescale=False, do_normalize=False),
}


@pytest.mark.parametrize("case", SQUARES)
def test_squares_to_the_last_bit(case, tmp_path):
    module = import_module("transformers.models.deepseek_vl.image_processing_pil_deepseek_vl")
    reference = module.DeepseekVLImageProcessorPil(**SQUARES[case])
    reference.save_pretrained(tmp_path)
    ours = read_image_processor(tmp_path)
    for size in SIZES:
        wanted = theirs(reference, make_image(*size))[0]
        np.testing.assert_array_equal(ours(make_image(*size)), wanted, err_msg=str(size))
        assert ours.output_size(*size) == wanted.shape[:2]


HYBRID = {
    "7b": dict(image_mean=[0.5] * 3, image_std=[0.5] * 3),
    "filters": dict(resample=2, high_res_resample=1, high_res_image_mean=[0.1, 0.5, 0.9], min_size=30),
    "nearest is not heard": dict(resample=2, high_res_resample=0),
    "no resizing": dict(do_resize=False),
    "no numbers": dict(do_rescale=False, do_normalize=False),
}


@pytest.mark.parametrize("case", HYBRID)
def test_both_squares_to_the_last_bit(case, tmp_path):
    module = import_module("transformers.models.deepseek_vl_hybrid.image_processing_pil_deepseek_vl_hybrid")
    sides = dict(size=dict(height=24, width=24), high_res_size=dict(height=64, width=64))
    reference = module.DeepseekVLHybridImageProcessorPil(**sides | HYBRID[case])
    reference.save_pretrained(tmp_path)
    ours = read_image_processor(tmp_path)
    for size in SIZES:
        image = make_image(*size)
        large = ours.prepare(image)
        np.testing.assert_array_equal(ours.normalise(large), theirs(reference, image, "high_res_pixel_values")[0])
        np.testing.assert_array_equal(ours.low(large), theirs(reference, image)[0], err_msg=str(size))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(size=dict(height=30, width=40)), r"size of \(30, 40\)"),
        (dict(size=dict(shortest_edge=40)), "size of None"),
        (dict(high_res_size=dict(height=30, width=40)), r"high_res_size of \(30, 40\)"),
        (dict(do_center_crop=True, crop_size=30), "do_center_crop=True"),
        (dict(high_res_image_mean=[0.5]), "high_res_image_mean"),
    ],
)
def test_options_are_refused_by_name(options, message):
    with pytest.raises(ConfigError, match=f"(?s){message}"):
        image_processor(dict(image_processor_type="DeepseekVLHybridImageProcessor") | options)
