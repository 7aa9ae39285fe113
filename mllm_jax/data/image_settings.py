"""The files of an image processor's settings: copied beside weights, and changed for another image size."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mllm_jax.data.image_processors import default_sizes, with_type
from mllm_jax.errors import ConfigError
from mllm_jax.files import read_json

SETTINGS = ("preprocessor_config.json", "processor_config.json", "video_preprocessor_config.json")
_PARTS = ("image_processor", "video_processor")  # of processor_config.json
_SIZES = ("size", "crop_size", "image_grid_pinpoints")
_COUNTS = ("image_seq_length", "num_image_tokens")  # of one image, in a whole model's processor


def has_settings(folder: Path) -> bool:
    """Returns whether a folder has an image processor's settings."""
    return any((folder / name).is_file() for name in SETTINGS)


def resize_settings(folder: Path, model: Path, old: int, new: int, tokens: int | None = None) -> None:
    """Rewrites the settings in a folder from images of `old` pixels a side to `new`.

    Args:
        model: the folder whose config.json gives the type of settings that name none.
        tokens: media tokens of one image, if the settings have them.
    """
    for name in SETTINGS:
        path = folder / name
        try:
            values = read_json(path, ConfigError)
        except FileNotFoundError:
            continue
        except OSError as error:
            raise ConfigError(f"{path}: {error}", "JSON", "fetch the file again") from error
        values = dict(values) if name == "processor_config.json" else _resized(with_type(values, model), old, new)
        for part in _PARTS:
            if isinstance(values.get(part), Mapping):
                values[part] = _resized(with_type(values[part], model), old, new)
        values |= {count: tokens for count in _COUNTS if count in values and tokens is not None}
        path.write_text(json.dumps(values, indent=2) + "\n", "utf-8")


def _resized(values: Mapping[str, Any], old: int, new: int) -> dict[str, Any]:
    """Scales the sizes of settings as the image's side; writes sizes that the type has by default."""
    given = {name: value for name, value in values.items() if value is not None}
    sizes = {name: value for name, value in {**default_sizes(values), **given}.items() if name in _SIZES}
    return {**values, **{name: _scaled(value, old, new) for name, value in sizes.items()}}


def _scaled(value: Any, old: int, new: int) -> Any:
    if isinstance(value, Mapping):
        return {name: _scaled(each, old, new) for name, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [_scaled(each, old, new) for each in value]
    return value if value is None else round(value * new / old)
