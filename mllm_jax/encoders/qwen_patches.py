"""The layout of packed images' patches in rows for Qwen's image encoders: integers, computed on the host."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from einops import rearrange

from mllm_jax.errors import DataError


class PatchLayout(NamedTuple):
    """The layout of rows of packed images: int32 NumPy arrays of fixed sizes.

    Attributes:
        source: [B, N] index among the processor's patches, which are those of all images of all rows in order; -1 is
            padding.
        segments: [B, N] number of the frame in its row, from 1; 0 is padding.
        coordinates: [B, N, 2] row and column in patches.
        grids: [B, N, 2] height and width in patches of the patch's image.
        windows: [B, N] number of the attention window, or None without windows.
    """

    source: np.ndarray
    segments: np.ndarray
    coordinates: np.ndarray
    grids: np.ndarray
    windows: np.ndarray | None

    def gather(self, patches: np.ndarray) -> np.ndarray:
        """Arranges the processor's patches float[sum of all t*h*w, P] as float[B, N, P], padded with zeros."""
        expected = int((self.source >= 0).sum())
        if len(patches) != expected:
            raise DataError(
                f"{len(patches)} patches", f"{expected}, the number in the layout's grids", "lay out the same images"
            )
        out = np.zeros((*self.source.shape, patches.shape[-1]), patches.dtype)
        here = self.source >= 0
        out[here] = patches[self.source[here]]
        return out


def lay_out_patches(
    rows: Sequence[Sequence[tuple[int, int, int]]],
    num_patches: int,
    merge_size: int = 2,
    window_side: int | None = None,
) -> PatchLayout:
    """Packs images and videos into rows of `num_patches`.

    Args:
        rows: for each row, (frames / temporal_patch_size, height, width) of each image in patches: `grid_thw`.
        num_patches: N, the same for every row.
        window_side: in patches, `QwenViTConfig.window_side`.

    Raises:
        DataError: a grid that merge_size does not divide, or more patches than a row holds.
    """
    shape = (len(rows), num_patches)
    source, segments = np.full(shape, -1, np.int32), np.zeros(shape, np.int32)
    coordinates, grids = np.zeros((*shape, 2), np.int32), np.zeros((*shape, 2), np.int32)
    if num_patches % merge_size**2:
        raise DataError(f"rows of {num_patches} patches", f"a multiple of {merge_size**2}", "change num_patches")
    taken = 0
    for b, images in enumerate(rows):
        start = frames = 0
        for t, h, w in images:
            if min(t, h, w) < 1 or h % merge_size or w % merge_size:
                raise DataError(
                    f"an image of {t} x {h} x {w} patches in row {b}",
                    f"at least one frame, and sides that are multiples of {merge_size}",
                    "resize the image as the processor does",
                )
            size = t * h * w
            if start + size > num_patches:
                needed = sum(math.prod(grid) for grid in images)
                raise DataError(
                    f"row {b} with {needed} patches",
                    f"at most {num_patches}",
                    "resize the images, put fewer in a row, or make rows longer",
                )
            here = slice(start, start + size)
            frame = rearrange(np.indices((h, w)), "a (h p) (w q) -> (h w p q) a", p=merge_size, q=merge_size)
            source[b, here] = np.arange(taken, taken + size)
            segments[b, here] = np.repeat(np.arange(frames + 1, frames + t + 1), h * w)
            coordinates[b, here] = np.tile(frame, (t, 1))
            grids[b, here] = h, w
            start, frames, taken = start + size, frames + t, taken + size
    windows = None if window_side is None else window_numbers(segments, coordinates, grids, window_side)
    return PatchLayout(source, segments, coordinates, grids, windows)


def window_numbers(segments, coordinates, grids, side: int):
    """Returns int[B, N]: a number for each window of each frame in a row, 0 for padding; takes NumPy or JAX arrays.

    Windows of `side` x `side` patches tile each frame from its upper left corner; those at the right and lower edges
    may be smaller.
    """
    columns = -(-grids[..., 1] // side)
    within = coordinates[..., 0] // side * columns + coordinates[..., 1] // side
    # A frame has at most as many windows as the row has patches.
    return (segments > 0) * (segments * segments.shape[1] + within)
