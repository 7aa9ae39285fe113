"""Qwen2-VL's choice of a size for a picture (arXiv 2409.12191): whole patches, and a number of pixels in a range."""

from __future__ import annotations

import math

from mllm_jax.errors import DataError

_MAX_ASPECT = 200


def smart_resize(height: int, width: int, factor: int, min_pixels: int, max_pixels: int) -> tuple[int, int]:
    """The sides nearest to a picture's that are multiples of `factor`, with a number of pixels in a range.

    Halves are rounded to even. The range may be left by thin pictures, whose shorter side is at least `factor`.

    Raises:
        DataError: no pixels, or one side more than 200 times the other.
    """
    if min(height, width) < 1 or max(height, width) > _MAX_ASPECT * min(height, width):
        raise DataError(
            f"a picture of {height} x {width} pixels",
            f"sides of which none is more than {_MAX_ASPECT} times the other",
            "crop it, or leave this record out",
        )
    high, wide = round(height / factor) * factor, round(width / factor) * factor
    if high * wide > max_pixels:
        shrink = math.sqrt(height * width / max_pixels)
        high, wide = (max(factor, math.floor(side / shrink / factor) * factor) for side in (height, width))
    elif high * wide < min_pixels:
        grow = math.sqrt(min_pixels / (height * width))
        high, wide = (math.ceil(side * grow / factor) * factor for side in (height, width))
    return high, wide
