"""Which type of image processor a folder means: as its file names it, or else the one that belongs to its model."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mllm_jax.errors import ConfigError
from mllm_jax.files import read_json

# The options that name a type, the first of them before the others; the last one is that of early versions.
TYPE_OPTIONS = ("image_processor_type", "video_processor_type", "feature_extractor_type")
# config.json's model_type -> the type, as transformers pairs them.
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
    """The type that a processor's options name, or None."""
    return next((values[name] for name in TYPE_OPTIONS if values.get(name)), None)


def with_type(values: Mapping[str, Any], folder: Path) -> Mapping[str, Any]:
    """The options with the type of the folder's model, where they name none and its config.json is there.

    Raises:
        ConfigError: a config.json that is no JSON object.
    """
    if named_type(values) is not None:
        return values
    try:
        model_type = read_json(folder / "config.json", ConfigError).get("model_type")
    except FileNotFoundError:
        return values
    known = OF_MODELS.get(model_type) if isinstance(model_type, str) else None
    return values if known is None else {**values, TYPE_OPTIONS[0]: known}
