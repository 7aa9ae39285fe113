"""Image processors equal transformers' own to the last bit, through folders, and refuse unsupported options."""

from __future__ import annotations

import json
import math
import subprocess
import sys
import tracemalloc
from dataclasses import replace
from importlib import import_module
from pathlib import Path

import numpy as np
import pytest
from einops import rearrange
from PIL import Image

from mllm_jax.data.image_processors import image_processor, read_image_processor
from mllm_jax.data.image_steps import smart_resize
from mllm_jax.errors import ConfigError, DataError

SIZES = ((48, 48), (37, 90), (91, 38), (20, 33), (1, 7), (120, 3), (64, 61))
IMAGENET_MEAN, IMAGENET_STD = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]
CASES = {
    "vit": ("vit.ViT", {}),
    "vit, nearest, 255": ("vit.ViT", dict(size=40, resample=0, do_rescale=False, image_mean=100.0, image_std=50.0)),
    "clip": ("clip.CLIP", {}),
    "clip 336": ("clip.CLIP", dict(size={"shortest_edge": 336}, crop_size=336)),
    "clip, odd crop": ("clip.CLIP", dict(size=45, crop_size={"height": 40, "width": 63})),
    "clip, no crop": ("clip.CLIP", dict(size={"shortest_edge": 30}, do_center_crop=False, resample=1)),
    "clip, crop alone": ("clip.CLIP", dict(do_resize=False, crop_size=[50, 41], do_normalize=False)),
    "internvit by clip": ("clip.CLIP", dict(size=44, crop_size=44, image_mean=IMAGENET_MEAN)),
    "siglip": ("siglip.Siglip", dict(size={"height": 38, "width": 52})),
    "siglip, no steps": ("siglip.Siglip", dict(do_resize=False, do_rescale=False, do_normalize=False)),
    "siglip, shortest": ("siglip.Siglip", dict(size=31)),
    "blip": ("blip.Blip", dict(size={"height": 224, "width": 224})),
    "dinov2": (
        "bit.Bit",
        dict(size={"shortest_edge": 57}, crop_size=50, image_mean=IMAGENET_MEAN, image_std=IMAGENET_STD),
    ),
    "bit, odd factor": ("bit.Bit", dict(rescale_factor=0.0173, size=33, crop_size=33, resample=4)),
    "internvl": ("got_ocr2.GotOcr2", dict(size={"height": 56, "width": 56}, image_std=IMAGENET_STD)),
}
QWEN = {
    "qwen2": {},
    "qwen2, bounds": dict(min_pixels=4 * 28 * 28, max_pixels=9 * 28 * 28),
    "qwen3": dict(size={"shortest_edge": 2048, "longest_edge": 9000}, patch_size=16, image_mean=[0.5] * 3),
    "three frames, merged by threes": dict(patch_size=4, merge_size=3, temporal_patch_size=3),
}


def make(name: str, options: dict):
    """Builds transformers' processor from "module.Prefix"."""
    module, prefix = name.split(".")
    pil = import_module(f"transformers.models.{module}.image_processing_pil_{module}")
    return getattr(pil, f"{prefix}ImageProcessorPil")(**options)


def make_image(height: int, width: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)


def theirs(reference, image: np.ndarray) -> dict[str, np.ndarray]:
    return reference(image, return_tensors="np", input_data_format="channels_last")


@pytest.mark.parametrize("case", CASES)
def test_pixels_to_the_last_bit(case, tmp_path):
    name, options = CASES[case]
    reference = make(name, options)
    reference.save_pretrained(tmp_path)
    ours = read_image_processor(tmp_path)
    assert ours == image_processor(options | {"image_processor_type": ours.kind}), "a file with these options alone"
    for size in SIZES:
        image = make_image(*size)
        wanted = rearrange(theirs(reference, image)["pixel_values"][0], "c h w -> h w c")
        found = ours(image)
        assert found.dtype == np.float32 and ours.output_size(*size) == found.shape[:2]
        np.testing.assert_array_equal(found, wanted, err_msg=str(size))


@pytest.mark.parametrize("case", QWEN)
def test_patches_to_the_last_bit(case, tmp_path):
    reference = make("qwen2_vl.Qwen2VL", QWEN[case])
    reference.save_pretrained(tmp_path)
    ours = read_image_processor(tmp_path)
    assert ours == image_processor(QWEN[case] | {"image_processor_type": "Qwen2VLImageProcessorFast"})
    for size in (*SIZES, (14, 42), (200, 300)):
        image = make_image(*size)
        wanted = theirs(reference, image)
        patches, grid = ours.patches(image)
        np.testing.assert_array_equal(patches, wanted["pixel_values"], err_msg=str(size))
        assert patches.dtype == np.float32 and grid == tuple(wanted["image_grid_thw"][0])
        side = ours.patch_size
        assert ours.output_size(*size) == ours(image).shape[:2] == (grid[1] * side, grid[2] * side)


def test_smart_resize_is_theirs():
    reference = import_module("transformers.models.qwen2_vl.image_processing_pil_qwen2_vl").smart_resize
    rng = np.random.default_rng(0)
    for height, width in [*rng.integers(7, 1200, (300, 2)).tolist(), (42, 70), (14, 98), (13, 2600)]:
        given = (height, width, 28, 3136, 300_000)
        assert smart_resize(*given) == reference(*given), given


def test_a_view_is_an_image():
    """Checks transposed and mirrored arrays, whose bytes are not in order."""
    ours = image_processor(dict(image_processor_type="ViTImageProcessor", size=20))
    image = make_image(30, 40)
    for view in (image[::-1], image[:, ::-1], image.transpose(1, 0, 2)):
        np.testing.assert_array_equal(ours(view), ours(view.copy()))


# ---- files


def test_old_files_say_feature_extractor_and_plain_numbers(tmp_path):
    options = dict(crop_size=336, size=336, resample=3, do_resize=True, do_center_crop=True, do_normalize=True)
    old = options | dict(feature_extractor_type="CLIPFeatureExtractor", image_mean=None)
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(old), "utf-8")
    image = make_image(350, 401)
    wanted = theirs(make("clip.CLIP", options), image)["pixel_values"][0]
    np.testing.assert_array_equal(read_image_processor(tmp_path)(image), rearrange(wanted, "c h w -> h w c"))


def test_a_processor_inside_a_larger_one_comes_first(tmp_path):
    inner = dict(image_processor_type="SiglipImageProcessorFast", size=dict(height=30, width=20))
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(inner | dict(size=50)), "utf-8")
    assert read_image_processor(tmp_path).shortest_edge == 50
    (tmp_path / "processor_config.json").write_text(json.dumps(dict(image_seq_length=4)), "utf-8")
    assert read_image_processor(tmp_path).shortest_edge == 50
    (tmp_path / "processor_config.json").write_text(json.dumps(dict(image_processor=inner)), "utf-8")
    assert read_image_processor(tmp_path).size == (30, 20)


def test_files_that_are_absent_or_broken(tmp_path):
    with pytest.raises(ConfigError, match="without preprocessor_config.json"):
        read_image_processor(tmp_path)
    path = tmp_path / "preprocessor_config.json"
    for text, message in (("{", "preprocessor_config.json"), ("[1]", "with a list")):
        path.write_text(text, "utf-8")
        with pytest.raises(ConfigError, match=message):
            read_image_processor(tmp_path)


CLIP, QWEN2 = dict(image_processor_type="CLIPImageProcessor"), dict(image_processor_type="Qwen2VLImageProcessor")
TILES = dict(image_processor_type="GotOcr2ImageProcessor")


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({}, "image_processor_type='None'.*expected: one of ViT"),
        (dict(image_processor_type="SamImageProcessor"), "SamImageProcessor"),
        (CLIP | dict(do_pad=True), "do_pad=True"),
        (CLIP | dict(use_square_size=True, do_flip=1), "do_flip=1, use_square_size=True"),
        (CLIP | dict(resample=9), "resample=9"),
        (CLIP | dict(size=dict(longest_edge=30)), "size=.*longest_edge"),
        (CLIP | dict(size=dict(shortest_edge=30, longest_edge=50)), "size=.*longest_edge"),
        (CLIP | dict(size=0), "size=0|size=.*0"),
        (CLIP | dict(crop_size=dict(shortest_edge=3)), "crop_size=.*shortest_edge"),
        (CLIP | dict(image_mean=[0.5]), "image_mean=.*one number a channel"),
        (dict(image_processor_type="ViTImageProcessor", do_center_crop=True), "crop_size=None"),
        (TILES | dict(crop_to_patches=True, size=dict(shortest_edge=9)), "crop_to_patches=True without height"),
        (TILES | dict(do_center_crop=True, crop_size=30), "do_center_crop=True"),
        (QWEN2 | dict(size=30), "size=30"),
        (QWEN2 | dict(size=dict(height=30, width=30)), "least and the most pixels"),
    ],
)
def test_options_are_refused_by_name(values, message):
    with pytest.raises(ConfigError, match=f"(?s){message}"):
        image_processor(values)


# ---- images


@pytest.mark.parametrize(
    ("image", "message"),
    [
        (np.zeros((8, 9), np.uint8), r"uint8 \[8, 9\]"),
        (np.zeros((8, 9, 1), np.uint8), r"\[8, 9, 1\]"),
        (np.zeros((8, 9, 4), np.uint8), r"\[8, 9, 4\]"),
        (np.zeros((3, 8, 9), np.uint8), r"\[3, 8, 9\]"),
        (np.zeros((1, 8, 9, 3), np.uint8), r"\[1, 8, 9, 3\]"),
        (np.zeros((8, 9, 3), np.float32), "float32"),
        (np.zeros((8, 9, 3), np.uint16), "uint16"),
        (np.zeros((0, 9, 3), np.uint8), "0 x 9 pixels"),
        (np.zeros((8, 0, 3), np.uint8), "8 x 0 pixels"),
        (b"bytes", "a bytes"),
    ],
)
def test_what_is_no_rgb_image_is_refused(image, message):
    for values in (CLIP, QWEN2):
        with pytest.raises(DataError, match=f"(?s){message}.*decode_image"):
            image_processor(values)(image)


def test_patches_are_refused_where_there_are_none():
    with pytest.raises(ConfigError, match="patches from a CLIPImageProcessor"):
        image_processor(CLIP).patches(make_image(30, 30))
    with pytest.raises(DataError, match="(?s)30 x 28 pixels.*multiples of 28"):
        image_processor(QWEN2 | dict(do_resize=False)).patches(make_image(30, 28))
    with pytest.raises(DataError, match="2 x 401 pixels"):
        image_processor(QWEN2)(make_image(2, 401))
    assert image_processor(QWEN2)(make_image(2, 400)).shape[0] == 28


def test_neither_transformers_nor_torch_is_imported():
    code = (
        "import sys, numpy as np; from mllm_jax.data.image_processors import image_processor as f; "
        "f({'image_processor_type': 'CLIPImageProcessor'})(np.zeros((9, 9, 3), np.uint8)); "
        "sys.exit(bool({'transformers', 'torch', 'torchvision', 'jax'} & sys.modules.keys()))"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parents[2])


# ---- bounds

GROWING = {
    "CLIP": dict(image_processor_type="CLIPImageProcessor"),
    "Bit": dict(image_processor_type="BitImageProcessor"),
    "LLaVA": dict(image_processor_type="LlavaImageProcessor"),
    "LLaVA, padded": dict(image_processor_type="LlavaImageProcessor", do_pad=True),
    "SigLIP, shortest edge": dict(image_processor_type="SiglipImageProcessor", size=224),
    "OneVision, padded": dict(image_processor_type="LlavaOnevisionImageProcessor", image_grid_pinpoints=[]),
    "Qwen2-VL": dict(image_processor_type="Qwen2VLImageProcessor"),
    "Qwen2-VL, many pixels": dict(image_processor_type="Qwen2VLImageProcessor", min_pixels=10**9, max_pixels=10**10),
    "crop": dict(image_processor_type="CLIPImageProcessor", do_resize=False, crop_size=10_000),
}
BOUNDED = {
    "ViT": dict(image_processor_type="ViTImageProcessor"),
    "SigLIP": dict(image_processor_type="SiglipImageProcessor"),
    "BLIP": dict(image_processor_type="BlipImageProcessor"),
    "LLaVA-NeXT": dict(image_processor_type="LlavaNextImageProcessor"),
    "OneVision": dict(image_processor_type="LlavaOnevisionImageProcessor"),
    "OneVision, frames": dict(image_processor_type="LlavaOnevisionVideoProcessor"),
    "InternVL, tiles": dict(image_processor_type="GotOcr2ImageProcessor", crop_to_patches=True),
    "InternVL, frames": dict(image_processor_type="InternVLVideoProcessor"),
    "DeepSeek": dict(image_processor_type="DeepseekVLImageProcessor"),
    "DeepSeek, hybrid": dict(image_processor_type="DeepseekVLHybridImageProcessor"),
}


def peak_of(function) -> int:
    """Returns the peak memory of NumPy and Python in bytes while the function runs, without Pillow's."""
    tracemalloc.start()
    try:
        function()
    finally:
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    return peak


@pytest.mark.parametrize("name", GROWING)
@pytest.mark.parametrize("size", [(65_000, 1), (1, 65_000)])
def test_a_thin_image_is_refused_before_anything_is_made_of_it(name, size, monkeypatch):
    processor, image = image_processor(GROWING[name]), np.zeros((*size, 3), np.uint8)

    def fail(*_):
        raise AssertionError("something was made")

    monkeypatch.setattr(Image.Image, "resize", fail)

    def refuse():
        read = processor.patches if processor.patch_size else processor.tiles
        with pytest.raises(DataError, match="65,000|65000"):
            read(image)
        with pytest.raises(DataError, match="65,000|65000"):
            processor(image)

    assert peak_of(refuse) < 1_000_000


@pytest.mark.parametrize("name", BOUNDED)
def test_other_processors_make_little_of_a_thin_image(name):
    """Checks processors whose output size is the same for every image."""
    processor = image_processor(BOUNDED[name])
    for size in ((65_000, 1), (1, 65_000)):
        tiles = processor.tiles(np.zeros((*size, 3), np.uint8))
        assert math.prod(tiles.shape[:3]) <= processor.pixels(*size) < 10_000_000


def test_a_large_photo_is_processed():
    """Checks 12,000 x 9,000 pixels; padded to a square they are 144 million."""
    photo = np.broadcast_to(np.uint8(7), (9_000, 12_000, 3))
    padded = image_processor(GROWING["LLaVA, padded"] | dict(resample=0)).prepare(photo)
    assert padded.shape == (224, 224, 3) and padded[112, 112].tolist() == [7, 7, 7]
    assert padded[0, 0].tolist() == [122, 116, 104]


def test_frames_and_tiles_are_bounded_together():
    qwen = image_processor(dict(image_processor_type="Qwen2VLImageProcessor", min_pixels=10**7, max_pixels=10**8))
    frame = np.broadcast_to(np.uint8(0), (20, 20, 3))
    with pytest.raises(DataError, match="100 frames of 1,0.* pixels together"):
        qwen.patches(*[frame] * 100)
    values = dict(image_processor_type="LlavaNextImageProcessor", crop_size=1, size=dict(shortest_edge=1_000))
    with pytest.raises(DataError, match="tiles of an image"):
        image_processor(values | dict(do_center_crop=False, crop_size=8)).tiles(make_image(50, 50))
    with pytest.raises(ConfigError, match="up to 1,000,000 tiles"):
        replace(image_processor(BOUNDED["InternVL, tiles"]), tile_range=(1, 1_000_000)).tiles(make_image(50, 50))


# ---- options of a wrong type or size

WRONG = {
    "rescale_factor": ({}, "1/255", True, float("nan"), 10**400),
    "image_mean": ("0.5", [None] * 3, [[0.5]] * 3, {}, [0.5] * 2, float("inf"), 10**400),
    "image_std": (0, [0.5, 0.5, 0.0], "0.5", {}, [True] * 3),
    "resample": ({}, [], "bicubic", 99, -1, 10**400),
    "size": (0, -1, "224", [224], [224, "224"], {"height": 0, "width": 9}, {"shortest_edge": "9"}, 10**9, [[]], 1.5),
    "crop_size": (0, "224", {"height": -1, "width": 9}, {"height": 9}, 10**400),
    "do_resize": ("no", {}, [], 7),
    "do_center_crop": ("no", [1]),
    "image_processor_type": ([], {}, 7, "\ud800"),
}
NAMED = {
    "GotOcr2": {"max_patches": (0, "6", {}, 10**9, 1.5), "min_patches": (0, -1, "1"), "crop_to_patches": ("yes", {})},
    "Qwen2VL": {
        "patch_size": (0, -1, "14", 10**9, {}), "merge_size": (0, "2"), "temporal_patch_size": (0, [2]),
        "min_pixels": (0, "9", 10**400), "max_pixels": (-1, {}), "size": (9, "9", [9, 9], {"shortest_edge": 0}),
    },
    "LlavaNext": {"image_grid_pinpoints": (7, "x", [7], [[7]], [[0, 336]], [["336", "336"]], [[336, 336]] * 99_999)},
    "DeepseekVLHybrid": {"min_size": (0, "14"), "high_res_size": (0, "x", [1, 2]), "high_res_image_std": (0, "x")},
}  # fmt: skip


@pytest.mark.parametrize("kind", ["CLIP", *NAMED])
def test_options_of_a_wrong_type_or_size_are_refused(kind):
    for name, wrong in (NAMED.get(kind) or WRONG).items():
        for value in wrong:
            values = {"image_processor_type": f"{kind}ImageProcessor", name: value}
            with pytest.raises(ConfigError) as refusal:
                image_processor(values)
            assert len(str(refusal.value)) < 1_000, (name, value)
            str(refusal.value).encode()


@pytest.mark.parametrize("text", ["[" * 100_000, "[]", "7", '"x"', "\ufeff{", "{" * 100_000])
def test_a_file_that_is_no_object_is_refused(tmp_path, text):
    (tmp_path / "preprocessor_config.json").write_text(text, "utf-8")
    with pytest.raises(ConfigError, match=r"preprocessor_config\.json"):
        read_image_processor(tmp_path)
