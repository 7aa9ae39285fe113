"""Bounds on the number of pixels of images, checked before memory is allocated.

A file of a few bytes can declare an image of 1 x 65,000 pixels; resized to a shorter side of 224, it would take 13 GB.
So the bounds apply to every size of an image on its way to the encoder, not only to its decoded size.
"""

from __future__ import annotations

from mllm_jax.errors import DataError

# An image that resizing enlarges: 224 x 107,000 pixels, or 119 tiles of 448.
MAX_GROWN_PIXELS = 24_000_000
# An image with margins: a photo of 12,000 x 9,000 pixels that is padded to a square has 144 million.
MAX_PADDED_PIXELS = 150_000_000
# All images, tiles and frames of one call, decoded or processed: 1.5 GB of bytes, 6 GB of float32.
MAX_CALL_PIXELS = 500_000_000

Size = tuple[int, int]


def require_resized(given: Size, size: Size) -> None:
    """Raises DataError if resizing would make an image of (height, width) `given` too large."""
    _require(given, size, max(MAX_GROWN_PIXELS, given[0] * given[1]), "resizing")


def require_padded(given: Size, size: Size) -> None:
    """Raises DataError if margins would make an image of (height, width) `given` too large."""
    _require(given, size, MAX_PADDED_PIXELS, "padding")


def _require(given: Size, size: Size, most: int, step: str) -> None:
    if size[0] * size[1] > most:
        raise DataError(
            f"an image of {given[0]:,} x {given[1]:,} pixels, which would become {size[0]:,} x {size[1]:,}",
            f"at most {most:,} pixels after {step}",
            "crop or leave out images that are long and thin, or set smaller sizes in preprocessor_config.json",
        )


def require_call(pixels: int, what: str) -> None:
    """Raises DataError if `what`, all media of one call together, has more than MAX_CALL_PIXELS pixels."""
    if pixels > MAX_CALL_PIXELS:
        raise DataError(
            f"{what} of {pixels:,} pixels together", f"at most {MAX_CALL_PIXELS:,} in one call", "give fewer at a time"
        )
