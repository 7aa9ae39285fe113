"""Galleries that measure retrieval on a split: its images and names, and distractors."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from mllm_jax.datasets.openmoji.catalog import Catalog, Dice, catalog
from mllm_jax.datasets.openmoji.images import EmojiImages
from mllm_jax.datasets.openmoji.questions import caption
from mllm_jax.errors import ConfigError

WAYS = ("image_to_text", "text_to_image")
_STREAM = 200  # different from the streams of sources and questions


@dataclass(frozen=True)
class EmojiGallery:
    """Images and their captions, all different; the first `asked` are the split's own, the others are distractors.

    Attributes:
        task: "image_to_text" searches for the caption of each image, "text_to_image" for the image of each caption.
        images: uint8[size, size, 3] each.
    """

    task: str
    images: tuple[np.ndarray, ...]
    captions: tuple[str, ...]
    asked: int


def galleries(
    config: str = "quickstart",
    split: str = "composition",
    image_size: int = 64,
    ways: int = 300,
    seed: int = 0,
    data_dir: str | None = None,
) -> list[EmojiGallery]:
    """Builds one gallery for each of WAYS: up to `ways` images of the split, filled up from `train` to `ways` in all.

    Other forms of the split's bases come first, so that the distractors are as similar as possible.

    Raises:
        ConfigError: more ways than there are different captions, or fewer than two.
        DataError: no such config or split, or an image that cannot be decoded.
    """
    own, train = catalog(config, split, data_dir), catalog(config, "train", data_dir)
    asked = _mixed(own, own.all, seed)[:ways]
    bases = {own.records[index].base for index in asked}
    taken = {caption(own, index) for index in asked}
    # Sorted by whether the base is another one; Python's sort keeps the mixed order within both groups.
    others = sorted(_mixed(train, train.all, seed), key=lambda index: train.records[index].base not in bases)
    others = [index for index in others if caption(train, index) not in taken][: ways - len(asked)]
    if len(asked) + len(others) < ways or ways < 2:
        raise ConfigError(
            f"retrieval among {ways} on {own.where}", f"2 to {len(asked) + len(others)} of them", "change `ways`"
        )
    of_own, of_train = EmojiImages(own), EmojiImages(train)
    drawn = [(own, of_own, index) for index in asked] + [(train, of_train, index) for index in others]
    images = tuple(of.single(index, image_size) for _, of, index in drawn)
    captions = tuple(caption(known, index) for known, _, index in drawn)
    return [EmojiGallery(task, images, captions, len(asked)) for task in WAYS]


def _mixed(known: Catalog, indices: list[int], seed: int) -> list[int]:
    """Returns one record of each caption, in a random order that is the same on every machine."""
    mixed = list(indices)
    Dice(seed, _STREAM).shuffle(mixed)
    found: dict[str, int] = {}
    for index in mixed:
        found.setdefault(caption(known, index), index)
    return list(found.values())
