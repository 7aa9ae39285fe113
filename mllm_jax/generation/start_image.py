"""Images that drawing begins with."""

from __future__ import annotations

from typing import Any

import numpy as np
from PIL import Image as Pillow

from mllm_jax.data.images import as_image
from mllm_jax.errors import DataError


def start_image(image: Any, height: int | None, width: int | None, unit: int) -> np.ndarray:
    """Reads a start image and resizes it as diffusers does.

    Args:
        image: a path, the bytes of a file, a Pillow image or uint8[H, W, 3], which is resized with Lanczos' filter; or
            float[H, W, 3] in [0, 1], whose nearest pixels are taken.
        height, width: of the result; None: the image's own, lowered to a multiple of `unit`.

    Returns:
        float32[height, width, 3] in [0, 1].
    """
    if isinstance(image, np.ndarray) and np.issubdtype(image.dtype, np.floating):
        if image.ndim != 3 or image.shape[-1] != 3 or not ((image >= 0) & (image <= 1)).all():
            raise DataError(
                f"a start image {image.dtype}{list(image.shape)}", "float[H, W, 3] from 0 to 1, or uint8", "convert it"
            )
        pixels = image.astype(np.float32)
    else:
        pixels = as_image(image)
    asked = [side or held // unit * unit for side, held in zip((height, width), pixels.shape, strict=False)]
    if 0 in asked:
        raise DataError(
            f"a start image of {pixels.shape[0]} x {pixels.shape[1]} pixels",
            f"sides from {unit} on",
            "take a larger one",
        )
    if pixels.shape[:2] == tuple(asked):
        pass
    elif pixels.dtype == np.uint8:
        pixels = np.asarray(Pillow.fromarray(pixels).resize(asked[::-1], Pillow.Resampling.LANCZOS))
    else:
        rows, columns = (np.arange(side) * held // side for side, held in zip(asked, pixels.shape, strict=False))
        pixels = pixels[rows][:, columns]
    return pixels.astype(np.float32) / 255 if pixels.dtype == np.uint8 else pixels
