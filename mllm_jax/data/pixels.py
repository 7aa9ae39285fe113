"""Bounds on how many pixels are made of images, checked before anything is allocated.

A file of some bytes can declare an image of 1 x 65,000 pixels; with its shorter side resized to 224, it would take
13 GB. So what counts is every size that an image has on its way to the encoder, not only the one it is decoded to.
"""

from __future__ import annotations

from collections.abc import Iterable

from mllm_jax.errors import DataError

# One image at any step: a photo of 12,000 x 9,000 pixels that is padded to a square has 144 million.
MAX_IMAGE_PIXELS = 150_000_000
# All images, tiles and frames of one call, decoded or processed: 1.5 GB of bytes, 6 GB of float32.
MAX_CALL_PIXELS = 500_000_000
_TODO = "crop or leave out images that are long and thin, or set smaller sizes in preprocessor_config.json"


def require_image(given: tuple[int, int], steps: Iterable[tuple[int, int]]) -> None:
    """Checks what becomes of one image.

    Args:
        given: its (height, width).
        steps: (height, width) of everything that is made of it.

    Raises:
        DataError: one of them has more than MAX_IMAGE_PIXELS pixels.
    """
    for height, width in steps:
        if height * width > MAX_IMAGE_PIXELS:
            raise DataError(
                f"an image of {given[0]:,} x {given[1]:,} pixels, which would become {height:,} x {width:,}",
                f"at most {MAX_IMAGE_PIXELS:,} pixels after resizing and padding",
                _TODO,
            )


def require_call(pixels: int, what: str) -> None:
    """Raises DataError: more than MAX_CALL_PIXELS pixels of `what`, all media of one call together."""
    if pixels > MAX_CALL_PIXELS:
        raise DataError(
            f"{what} of {pixels:,} pixels together", f"at most {MAX_CALL_PIXELS:,} in one call", "give fewer at a time"
        )
