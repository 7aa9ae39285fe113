"""Image processors of Hugging Face folders, with only Pillow and NumPy.

The results equal those of transformers' `...ImageProcessorPil` classes to the last bit. This file does not call them:
where torch and torchvision are installed, they import both, which takes about five seconds and fails if the versions do
not match. transformers' default processors use torchvision and round differently from those classes and this file.

Some families' authors prepare images differently in their own repositories:

- CLIP, DINOv2 (torchvision on Pillow images): the same resizing, bicubic with antialiasing on bytes. Their centre
  crop rounds half a pixel to even where this one rounds down, so it may be one pixel further; they divide bytes by 255
  in float32, which changes last bits.
- EVA-CLIP in BLIP-2 (LAVIS): the same resizing to a square, the same last bits.
- ViT, SigLIP (big_vision): TensorFlow's bilinear resizing, in most configs without antialiasing, then [-1, 1]. The
  folders on the hub use bicubic for SigLIP: a much reduced image looks different.
- LLaVA-1.5: pads to a square with the mean colour before the centre crop. Its folders on the hub leave that out;
  `do_pad` adds it, here as in transformers. LLaVA-NeXT and LLaVA-OneVision: the same tiles.
- Qwen2-VL: its helper package resizes once before, to its own bounds, so it may resample an image twice.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

from PIL import Image

from mllm_jax.data.image_steps import ImageProcessor
from mllm_jax.data.tiles import MAX_TILES
from mllm_jax.errors import ConfigError
from mllm_jax.files import read_json

# The options that name a type, in order of precedence; the last one is that of early versions.
TYPE_OPTIONS = ("image_processor_type", "video_processor_type", "feature_extractor_type")
# config.json's model_type -> the type, with the same pairs as transformers.
OF_MODELS = {
    "vit": "ViTImageProcessor",
    "dinov2": "BitImageProcessor",
    "clip": "CLIPImageProcessor",
    "siglip": "SiglipImageProcessor",
    "llava": "LlavaImageProcessor",
    "llava_next": "LlavaNextImageProcessor",
    "llava_onevision": "LlavaOnevisionImageProcessor",
    "blip-2": "BlipImageProcessor",
    "instructblip": "BlipImageProcessor",
    "internvl": "GotOcr2ImageProcessor",
    "qwen2_vl": "Qwen2VLImageProcessor",
    "qwen2_5_vl": "Qwen2VLImageProcessor",
    "qwen3_vl": "Qwen2VLImageProcessor",
    "deepseek_vl": "DeepseekVLImageProcessor",
    "deepseek_vl_hybrid": "DeepseekVLHybridImageProcessor",
}


def named_type(values: Mapping[str, Any]) -> str | None:
    """Returns the type that a processor's options name, or None."""
    return next((values[name] for name in TYPE_OPTIONS if values.get(name)), None)


def with_type(values: Mapping[str, Any], folder: Path) -> Mapping[str, Any]:
    """Returns the options; if they name no type, adds that of the folder's model if config.json exists.

    Raises:
        ConfigError: config.json is no JSON object.
    """
    if named_type(values) is not None:
        return values
    try:
        model_type = read_json(folder / "config.json", ConfigError).get("model_type")
    except FileNotFoundError:
        return values
    known = OF_MODELS.get(model_type) if isinstance(model_type, str) else None
    return values if known is None else {**values, TYPE_OPTIONS[0]: known}


_MAX_SIDE = 65_536  # pixels
_MAX_PIXELS = 1 << 40  # largest bound on pixels in an option
_MAX_RESOLUTIONS = 10_000
_COUNTS = {
    "patch_size": 4_096, "merge_size": 64, "temporal_patch_size": 64, "min_pixels": _MAX_PIXELS,
    "max_pixels": _MAX_PIXELS, "min_size": _MAX_SIDE, "min_patches": MAX_TILES, "max_patches": MAX_TILES,
}  # fmt: skip
_NUMBERS = ("image_mean", "image_std", "high_res_image_mean", "high_res_image_std")


def check_options(values: Mapping[str, Any], refuse: Callable[[str, str], NoReturn]) -> None:
    """Checks the options that processors share, whether or not a processor reads them.

    Args:
        values: of a preprocessor_config.json; null means that an option is missing.
        refuse: called with the given value and the expected one.
    """
    for name, value in values.items():
        if value is None:
            continue
        if name in _COUNTS and not _is_count(value, _COUNTS[name]):
            refuse(f"{name}={value!r:.100}", f"an integer from 1 to {_COUNTS[name]:,}")
        elif name in ("size", "crop_size", "high_res_size"):
            _check_size(name, value, refuse)
        elif name in _NUMBERS:
            _check_numbers(name, value, refuse)
        elif name == "rescale_factor" and not _is_number(value):
            refuse(f"rescale_factor={value!r:.100}", "a number")
        elif name in ("resample", "high_res_resample") and type(value) is not int:
            refuse(f"{name}={value!r:.100}", "Pillow's number of a filter, 0 to 5")
        elif name == "image_grid_pinpoints":
            _check_resolutions(value, refuse)
        elif name.startswith(("do_", "crop_to", "default_to")) and not (isinstance(value, bool) or value in (0, 1)):
            refuse(f"{name}={value!r:.100}", "true or false")


def _is_count(value: Any, most: int) -> bool:
    return type(value) is int and 1 <= value <= most


def _is_number(value: Any) -> bool:
    """Returns whether a value is a number that is finite in float32."""
    return type(value) in (int, float) and abs(value) < 1e30 and math.isfinite(value)


def _check_size(name: str, size: Any, refuse: Callable[[str, str], NoReturn]) -> None:
    # Qwen2-VL gives numbers of pixels under the names of edges.
    parts = size.values() if isinstance(size, Mapping) else size if isinstance(size, (list, tuple)) else [size]
    most = _MAX_PIXELS if isinstance(size, Mapping) and {"longest_edge", "max_pixels"} & set(size) else _MAX_SIDE
    if not all(part is None or _is_count(part, most) for part in parts):
        refuse(f"{name}={size!r:.100}", f"height and width, or shortest_edge, in pixels, from 1 to {most:,}")


def _check_numbers(name: str, value: Any, refuse: Callable[[str, str], NoReturn]) -> None:
    numbers = value if isinstance(value, (list, tuple)) else [value]
    if not all(map(_is_number, numbers)) or name.endswith("std") and not all(numbers):
        refuse(f"{name}={value!r:.100}", f"a number for each channel{', not 0' * name.endswith('std')}")


def _check_resolutions(value: Any, refuse: Callable[[str, str], NoReturn]) -> None:
    pairs = value if isinstance(value, (list, tuple)) and len(value) <= _MAX_RESOLUTIONS else [None]
    for pair in pairs:
        two = isinstance(pair, (list, tuple)) and len(pair) == 2
        if not two or not all(_is_count(side, _MAX_SIDE) for side in pair):
            refuse(f"image_grid_pinpoints={value!r:.100}", f"pairs of height and width, from 1 to {_MAX_SIDE:,}")


_HALF = (0.5, 0.5, 0.5)
_CLIP_MEAN, _CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)


class _Kind(NamedTuple):
    """The defaults of a type of processor."""

    size: Mapping[str, int]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    resample: Image.Resampling = Image.Resampling.BICUBIC
    crop: int | None = None
    square: bool = True  # meaning of a plain number as `size`
    resolutions: tuple[tuple[int, int], ...] = ()


def _square(side: int) -> dict[str, int]:
    return dict(height=side, width=side)


_KINDS = {
    "ViTImageProcessor": _Kind(_square(224), _HALF, _HALF, Image.Resampling.BILINEAR),
    "CLIPImageProcessor": _Kind(dict(shortest_edge=224), _CLIP_MEAN, _CLIP_STD, crop=224, square=False),
    "SiglipImageProcessor": _Kind(_square(224), _HALF, _HALF, square=False),
    "LlavaImageProcessor": _Kind(dict(shortest_edge=224), _CLIP_MEAN, _CLIP_STD, crop=224, square=False),
    "LlavaNextImageProcessor": _Kind(
        dict(shortest_edge=224),
        _CLIP_MEAN,
        _CLIP_STD,
        crop=224,
        square=False,
        resolutions=((336, 672), (672, 336), (672, 672), (1008, 336), (336, 1008)),
    ),
    "LlavaOnevisionImageProcessor": _Kind(
        _square(384), _CLIP_MEAN, _CLIP_STD, square=False, resolutions=tuple(product(range(384, 2305, 384), repeat=2))
    ),
    "LlavaOnevisionVideoProcessor": _Kind(_square(384), _CLIP_MEAN, _CLIP_STD, square=False),
    "BlipImageProcessor": _Kind(_square(384), _CLIP_MEAN, _CLIP_STD),
    "BitImageProcessor": _Kind(dict(shortest_edge=224), _CLIP_MEAN, _CLIP_STD, crop=224, square=False),
    "GotOcr2ImageProcessor": _Kind(_square(384), _CLIP_MEAN, _CLIP_STD),
    "InternVLVideoProcessor": _Kind(_square(384), _CLIP_MEAN, _CLIP_STD),
    "DeepseekVLImageProcessor": _Kind(_square(384), _CLIP_MEAN, _CLIP_STD),
    "DeepseekVLHybridImageProcessor": _Kind(_square(384), _CLIP_MEAN, _CLIP_STD),
    "Qwen2VLImageProcessor": _Kind(
        dict(shortest_edge=56 * 56, longest_edge=28 * 28 * 1280), _CLIP_MEAN, _CLIP_STD, square=False
    ),
    "Qwen2VLVideoProcessor": _Kind(
        dict(shortest_edge=128 * 28 * 28, longest_edge=28 * 28 * 768), _CLIP_MEAN, _CLIP_STD, square=False
    ),
    "Qwen3VLVideoProcessor": _Kind(
        dict(shortest_edge=128 * 32 * 32, longest_edge=32 * 32 * 768), _HALF, _HALF, square=False
    ),
}
_PACKED = ("Qwen2VLImageProcessor", "Qwen2VLVideoProcessor", "Qwen3VLVideoProcessor")
_SQUARED = ("DeepseekVLImageProcessor", "DeepseekVLHybridImageProcessor")  # resized, then padded to a square
# fmt: off
_OF_SOUNDS = (
    *("feature_size", "sampling_rate", "hop_length", "chunk_length", "n_fft", "n_samples", "nb_max_frames", "dither"),
    *("padding_side", "padding_value", "return_attention_mask"),
)
_IDLE = (  # options of layout, of training or of other tools; images are always RGB here
    "image_processor_type", "feature_extractor_type", "processor_class", "auto_map", "do_convert_rgb", "data_format",
    "input_data_format", "device", "return_tensors", "disable_grouping", "image_seq_length", "_valid_processor_keys",
    "pad_size", "video_processor_type", "vision_token_id",
)
# fmt: on


def read_image_processor(folder: str | Path, **options: Any) -> ImageProcessor:
    """Reads the processor of a Hugging Face folder.

    Args:
        folder: with preprocessor_config.json, or a processor_config.json with `image_processor`, which has precedence
            as in transformers. If the file names no type, `model_type` in config.json decides.
        options: override the file's, as do those of transformers' processors of whole models.

    Raises:
        ConfigError: neither file exists, it is no JSON, its type is not supported, or an option would change the pixels
            and is not supported.
    """
    return _read(folder, (("processor_config.json", "image_processor"), ("preprocessor_config.json", None)), options)


def read_video_processor(folder: str | Path) -> ImageProcessor:
    """Reads the processor of video frames of a Hugging Face folder; each frame is one tile. Raises as for images.

    transformers resizes frames with torchvision: about one byte in 300 differs by one from Pillow's result here.

    Args:
        folder: with a processor_config.json with `video_processor`, video_preprocessor_config.json or, if images and
            frames share it, preprocessor_config.json; the first of these.
    """
    names = ("processor_config.json", "video_preprocessor_config.json", "preprocessor_config.json")
    found = _read(folder, tuple(zip(names, ("video_processor", None, None), strict=True)))
    return replace(found, background=None, resolutions=(), tile_range=None)


def default_sizes(values: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the default sizes of the type of processor that the settings name; none for an unknown type."""
    name = str(named_type(values)).replace("FeatureExtractor", "ImageProcessor").removesuffix("Fast")
    kind = _KINDS.get(name.removesuffix("Pil"))
    if kind is None:
        return {}
    sizes = dict(size=dict(kind.size), crop_size=kind.crop, image_grid_pinpoints=[list(r) for r in kind.resolutions])
    return {name: value for name, value in sizes.items() if value}


def settings(folder: str | Path, places: Sequence[tuple[str, str | None]]) -> tuple[Any, str] | None:
    """Returns the settings in the first of these files, or parts of files, and the file's path; None: there are none.

    Raises:
        ConfigError: a file that is no JSON, or cannot be read.
    """
    for name, part in places:
        path = Path(folder) / name
        try:
            values = read_json(path, ConfigError)
        except FileNotFoundError:
            continue
        except OSError as error:
            raise ConfigError(f"{path}: {error}", "JSON", "fetch the file again") from error
        values = values.get(part) if part and isinstance(values, dict) else values
        if values is not None:
            return values, str(path)
    return None


def _read(folder: str | Path, places: Sequence[tuple[str, str | None]], more: Mapping = {}) -> ImageProcessor:  # noqa: B006
    """Reads the processor from the first of these files, or parts of files; `more` overrides its options."""
    found = settings(folder, places)
    if found is None:
        raise ConfigError(
            f"{folder} without preprocessor_config.json",
            "a folder with its processor's settings",
            "fetch the file as well",
        )
    values, path = found
    if isinstance(values, Mapping):
        values = {**with_type(values, Path(folder)), **more}
    return image_processor(values, path)


def image_processor(values: Mapping[str, Any], what: str = "preprocessor_config.json") -> ImageProcessor:
    """Builds the processor that a preprocessor_config.json describes.

    Args:
        values: its dictionary.
        what: name of the file for messages.

    Raises:
        ConfigError: see `read_image_processor`.
    """
    if not isinstance(values, Mapping):
        raise ConfigError(f"{what} with {type(values).__name__}", "a JSON object", "fetch the file again")
    kind = _kind(values, what)
    default = _KINDS[kind]
    read = set(_IDLE)

    def option(name: str, otherwise: Any = None) -> Any:
        read.add(name)
        value = values.get(name)
        return otherwise if value is None else value

    def refuse(given: str, expected: str):
        raise ConfigError(f"{what}: {given}", expected, "use another processor, or prepare the images yourself")

    check_options(values, refuse)
    fields: dict[str, Any] = dict(kind=kind, resample=option("resample", int(default.resample)))
    if fields["resample"] not in [int(filter) for filter in Image.Resampling]:
        refuse(f"resample={fields['resample']!r}", "Pillow's number of a filter, 0 to 5")
    square = option("default_to_square", default.square)
    size, crop, resize = option("size", default.size), option("crop_size", default.crop), option("do_resize", True)
    if kind in _PACKED:
        fields |= dict(
            patch_size=option("patch_size", 16 if kind == "Qwen3VLVideoProcessor" else 14),
            merge_size=option("merge_size", 2),
            temporal_patch_size=option("temporal_patch_size", 2),
        )
        size = dict(size) if isinstance(size, Mapping) else refuse(f"size={size!r}", "least and most pixels")
        bounds = [option("min_pixels", size.get("shortest_edge")), option("max_pixels", size.get("longest_edge"))]
        if not all(isinstance(bound, int) and bound > 0 for bound in bounds):
            refuse(f"size={size!r}", "shortest_edge and longest_edge, the least and the most pixels")
        fields["pixel_range"] = tuple(bounds) if resize else None
    elif resize:
        fields |= _read_size(size, square, refuse)
    if kind in _SQUARED and resize:
        fields["longest_edge"] = _side(fields.pop("size", None), "size", refuse), option("min_size", 14)
    if option("do_center_crop", default.crop is not None):
        if kind in (*_PACKED, "GotOcr2ImageProcessor", *_SQUARED):
            refuse("do_center_crop=True", f"no crop: {kind} does not crop")
        sides = _read_size(crop, True, refuse, "crop_size") if crop is not None else {}
        fields["crop_size"] = sides.get("size") or refuse(f"crop_size={crop!r}", "its height and width")
    if kind in ("LlavaImageProcessor", "LlavaOnevisionImageProcessor"):
        colour = option("image_mean", default.mean)
        if option("do_pad", kind == "LlavaOnevisionImageProcessor") or default.resolutions:
            fields["background"] = _colour(colour, "image_mean", refuse)
    if default.resolutions:
        if not resize:
            refuse("do_resize=False", f"true: {kind} resizes images to tiles")
        resolutions = option("image_grid_pinpoints", default.resolutions)
        fields["resolutions"] = tuple((int(height), int(width)) for height, width in resolutions)
        whole = _read_size(size, square, refuse) if crop is None else _read_size(crop, True, refuse, "crop_size")
        fields["tile_size"] = whole["size"][0] if "size" in whole else whole["shortest_edge"]
        read |= {"do_pad", "aspect_ratio_setting"}  # of the batch, with tiles of zeros; of the original repository
    if kind == "GotOcr2ImageProcessor":
        cuts, most = option("crop_to_patches", False), option("max_patches", 12)
        least = option("min_patches", 1)
        if cuts and "size" not in fields:
            refuse("crop_to_patches=True without height and width to resize to", "these, for each tile")
        fields["tile_range"] = (least, most) if cuts and most > 1 else None
    if kind.endswith("VideoProcessor"):
        # options of the choice of frames, see `mllm_jax.data.video_settings`
        read |= {"return_metadata", "video_metadata", "initial_shift", "num_frames", "fps"}
    if kind in _PACKED[1:]:
        read |= {"do_sample_frames", "min_frames", "max_frames", "max_video_tokens", "max_image_size", "max_duration"}
    if kind in _SQUARED:
        colour = _colour(option("image_mean", default.mean), "image_mean", refuse)
        pads = option("do_pad", True) and (resize or kind == "DeepseekVLImageProcessor")
        fields["background"] = colour if pads else None
        read |= {"min_size", "background_color", "high_res_background_color"}  # the colours are those of the means
    factor = option("rescale_factor", 1 / 255)
    fields["rescale_factor"] = factor if option("do_rescale", True) else None
    mean, std = option("image_mean", default.mean), option("image_std", default.std)
    if option("do_normalize", True):
        fields |= dict(mean=_three(mean, "image_mean", refuse), std=_three(std, "image_std", refuse))
    if kind == "DeepseekVLHybridImageProcessor":
        # The larger image is made first, and the smaller one from it.
        mean, std = option("high_res_image_mean", default.mean), option("high_res_image_std", default.std)
        larger = _read_size(option("high_res_size", 1024), True, refuse, "high_res_size")
        larger = _side(larger.get("size"), "high_res_size", refuse), option("min_size", 14)
        low = ImageProcessor(**fields)
        fields |= dict(low=low, resample=option("high_res_resample", 3) or low.resample)  # 0 means none there
        fields |= dict(longest_edge=larger if resize else None)
        fields |= dict(background=pads and _colour(mean, "high_res_image_mean", refuse) or None)
        if low.mean is not None:
            mean, std = _three(mean, "high_res_image_mean", refuse), _three(std, "high_res_image_std", refuse)
            fields |= dict(mean=mean, std=std)
    if values.get("feature_extractor_type") == "WhisperFeatureExtractor":  # Qwen2.5-Omni's file is of both processors
        read |= set(_OF_SOUNDS)
    unread = {name: value for name, value in values.items() if name not in read and value not in (None, False)}
    if unread:
        refuse(", ".join(f"{name}={value!r}" for name, value in sorted(unread.items())), f"options of {kind}")
    return ImageProcessor(**fields)


def _kind(values: Mapping[str, Any], what: str) -> str:
    """Returns the type's plain name: older files call processors feature extractors."""
    given = str(named_type(values))
    kind = given.replace("FeatureExtractor", "ImageProcessor").removesuffix("Fast").removesuffix("Pil")
    if kind not in _KINDS:
        raise ConfigError(
            f"{what}: image_processor_type={given!r}",
            f"one of {', '.join(_KINDS)}",
            "use another processor, or prepare the images yourself",
        )
    return kind


def _read_size(size: Any, square: bool, refuse, name: str = "size") -> dict[str, Any]:
    """Reads a size in any of its forms as fields of the processor."""
    if isinstance(size, int):
        size = _square(size) if square else dict(shortest_edge=size)
    elif isinstance(size, (list, tuple)) and len(size) == 2:
        size = dict(height=size[0], width=size[1])
    given = {key: value for key, value in size.items() if value is not None} if isinstance(size, Mapping) else {}
    if not all(isinstance(value, int) and value > 0 for value in given.values()):
        given = {}
    if given.keys() == {"height", "width"}:
        return dict(size=(given["height"], given["width"]))
    if given.keys() == {"shortest_edge"}:
        return dict(shortest_edge=given["shortest_edge"])
    return refuse(f"{name}={size!r}", "height and width, or shortest_edge, in pixels")


def _side(size: tuple[int, int] | None, name: str, refuse) -> int:
    if size is None or size[0] != size[1]:
        refuse(f"{name} of {size}", "equal height and width: images are padded to a square")
    return size[0]


def _colour(mean: Any, name: str, refuse) -> tuple[int, ...]:
    """Returns the bytes of a mean colour, rounded down."""
    return tuple(int(x * 255) for x in _three(mean, name, refuse))


def _three(value: Any, name: str, refuse) -> tuple[float, ...]:
    values = (value,) * 3 if isinstance(value, (int, float)) else tuple(value)
    if len(values) != 3:
        refuse(f"{name}={value!r}", "one number a channel, of which there are 3")
    return values
