"""What the options of a preprocessor_config.json may be: checked by type and range before any is read."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, NoReturn

from mllm_jax.data.tiles import MAX_TILES

_MAX_SIDE = 65_536  # pixels
_MAX_PIXELS = 1 << 40  # what a bound on pixels may say
_MAX_RESOLUTIONS = 10_000
_COUNTS = {
    "patch_size": 4_096, "merge_size": 64, "temporal_patch_size": 64, "min_pixels": _MAX_PIXELS,
    "max_pixels": _MAX_PIXELS, "min_size": _MAX_SIDE, "min_patches": MAX_TILES, "max_patches": MAX_TILES,
}  # fmt: skip
_NUMBERS = ("image_mean", "image_std", "high_res_image_mean", "high_res_image_std")


def check_options(values: Mapping[str, Any], refuse: Callable[[str, str], NoReturn]) -> None:
    """Checks the options that processors share; which of them one reads, and how, is its own affair.

    Args:
        values: of a preprocessor_config.json; null is an option that is left out.
        refuse: is called with what is given and what is expected.
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
    """A finite number that float32 holds."""
    return type(value) in (int, float) and abs(value) < 1e30 and math.isfinite(value)


def _check_size(name: str, size: Any, refuse: Callable[[str, str], NoReturn]) -> None:
    # Qwen2-VL gives numbers of pixels by the names of edges.
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
