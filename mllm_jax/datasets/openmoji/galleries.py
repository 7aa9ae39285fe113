"""Galleries that measure retrieval on a split: its pictures and names, and others to confuse them with."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from mllm_jax.datasets.openmoji.catalog import Catalog, Dice, catalog
from mllm_jax.datasets.openmoji.pictures import Pictures
from mllm_jax.datasets.openmoji.questions import caption
from mllm_jax.errors import ConfigError

WAYS = ("image_to_text", "text_to_image")
_STREAM = 200  # far from the streams of sources and questions


@dataclass(frozen=True)
class Gallery:
    """Pictures and their captions, all different; the first `asked` are the split's own, the others only stand by.

    Attributes:
        task: "image_to_text" looks for the caption of each picture, "text_to_image" the reverse.
        pictures: uint8[size, size, 3] each.
    """

    task: str
    pictures: tuple[np.ndarray, ...]
    captions: tuple[str, ...]
    asked: int


def galleries(
    config: str = "quickstart",
    split: str = "composition",
    image_size: int = 64,
    ways: int = 300,
    seed: int = 0,
    data_dir: str | None = None,
) -> list[Gallery]:
    """One gallery for each of WAYS: up to `ways` pictures of the split, filled up from `train` to `ways` in all.

    Other forms of the bases asked for come first, so that what stands by is as like as the data has it.

    Raises:
        ConfigError: more ways than there are different captions, or fewer than two.
        DataError: no such config or split, or a picture that cannot be decoded.
    """
    own, train = catalog(config, split, data_dir), catalog(config, "train", data_dir)
    asked = _mixed(own, own.all, seed)[:ways]
    bases = {own.records[index].base for index in asked}
    taken = {caption(own, index) for index in asked}
    # Sorted by whether the base is a stranger: Python's sort keeps the mixed order within both.
    others = sorted(_mixed(train, train.all, seed), key=lambda index: train.records[index].base not in bases)
    others = [index for index in others if caption(train, index) not in taken][: ways - len(asked)]
    if len(asked) + len(others) < ways or ways < 2:
        raise ConfigError(
            f"retrieval among {ways} on {own.where}", f"2 to {len(asked) + len(others)} of them", "change `ways`"
        )
    drawn = [(own, Pictures(own), index) for index in asked] + [(train, Pictures(train), index) for index in others]
    pictures = tuple(of.single(index, image_size) for _, of, index in drawn)
    captions = tuple(caption(known, index) for known, _, index in drawn)
    return [Gallery(task, pictures, captions, len(asked)) for task in WAYS]


def _mixed(known: Catalog, indices: list[int], seed: int) -> list[int]:
    """One record of each caption, in a random order that is the same everywhere."""
    mixed = list(indices)
    Dice(seed, _STREAM).shuffle(mixed)
    found: dict[str, int] = {}
    for index in mixed:
        found.setdefault(caption(known, index), index)
    return list(found.values())
