"""The names of slots, by their contents and modality."""

from __future__ import annotations

from dataclasses import replace

import pytest
from toy_data import IMAGES, processor

from mllm_jax.data.pipeline import Pipeline
from mllm_jax.data.units import in_words
from mllm_jax.errors import DataError
from mllm_jax.models.internvl import InternVLLayout
from mllm_jax.models.qwen_vl import QwenVLLayout


@pytest.mark.parametrize(
    "slots,unit,said",
    [
        ({"image": 1}, "image", "1 image"),
        ({"image": 2, "audio": 1}, "image", "2 images and 1 audio"),
        ({"image": 1}, "tile", "1 image tile"),
        ({"image": 12_000}, "patch", "12,000 image patches"),
        ({"video": 1, "image": 4}, "patch", "1 video patch and 4 image patches"),
        ({}, "patch", "no media"),
        ({"image": 3}, "slot", "3 image slots"),
    ],
)
def test_words(slots, unit, said):
    assert in_words(slots, unit) == said


@pytest.mark.parametrize("unit,said", [("image", "2 images"), ("tile", "2 image tiles"), ("patch", "2 image patches")])
def test_an_example_that_takes_more_slots_than_a_row_has(unit, said):
    of_unit = processor()
    of_unit.layout.unit = unit
    with pytest.raises(DataError, match=rf"toy_pairs\[0\]: {said}\n.*at most 1 {said[2:].removesuffix('s')[:11]}"):
        Pipeline(replace(IMAGES, slots={"image": 1}), of_unit, seed=0)


def test_layouts_say_what_their_slots_hold():
    assert (QwenVLLayout.unit, InternVLLayout.unit) == ("patch", "tile")
