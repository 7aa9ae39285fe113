"""Galleries: their content, their recall and its controls."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pytest

from mllm_jax.datasets.openmoji.catalog import catalog
from mllm_jax.datasets.openmoji.galleries import galleries
from mllm_jax.errors import ConfigError, DataError
from mllm_jax.evaluation.galleries import search


def test_a_gallery_is_the_split_filled_up_with_what_is_most_like_it():
    there, back = galleries("quickstart", "composition", 16, ways=300)
    assert (there.task, back.task) == ("image_to_text", "text_to_image")
    assert there.captions == back.captions and all(map(np.array_equal, there.images, back.images))
    assert len(there.captions) == len(set(there.captions)) == len(there.images) == 300
    own, train = catalog("quickstart", "composition"), catalog("quickstart", "train")
    names = {record.name for record in own.records}
    assert there.asked == len(names) and set(there.captions[: there.asked]) == names
    bases = {record.base for record in own.records}
    base_of = {record.name: record.base for record in train.records}
    near = [base_of[name] in bases for name in there.captions[there.asked :]]
    assert all(near), "there are more than 190 other forms of these bases"
    assert galleries("quickstart", "composition", 16, ways=300)[0].captions == there.captions
    assert galleries("quickstart", "composition", 16, ways=300, seed=1)[0].captions != there.captions


def test_a_split_larger_than_the_gallery_is_cut_and_too_many_ways_are_refused():
    small = galleries("quickstart", "composition", 16, ways=20)[0]
    assert small.asked == len(small.captions) == 20
    for ways in (1, 100_000):
        with pytest.raises(ConfigError, match=f"retrieval among {ways}"):
            galleries("quickstart", "composition", 16, ways=ways)


@dataclass(frozen=True)
class Hand:
    task: str
    images: tuple
    captions: tuple
    asked: int


class Angles:
    """Embeds an image by its grey value and a caption by the number that it spells, as an angle in degrees."""

    @staticmethod
    def _vectors(values):
        angle = np.radians(np.asarray(values, np.float32))
        return np.stack([np.cos(angle), np.sin(angle)], axis=1)

    def embed(self, texts=None, images=None):
        return self._vectors([float(text) for text in texts] if images is None else [x[0, 0, 0] for x in images])


def hand(task: str) -> Hand:
    # Own: 0-0 is right; 50-90: the caption 60 of another pair is nearer; its image 61 is nearer to 90 as well.
    images = tuple(np.full((4, 4, 3), value, np.uint8) for value in (0, 50, 61))
    return Hand(task, images, ("0", "90", "60"), 2)


@pytest.mark.parametrize("task", ["image_to_text", "text_to_image"])
def test_recall_counts_strangers_and_keeps_to_its_own(task):
    measured = search(Angles(), hand(task))
    score, said = measured.metrics, measured.predictions
    assert (score["accuracy"], score["recall_at_5"], score["n"], score["ways"]) == (0.5, 1.0, 2, 3)
    assert (score["accuracy_shuffled_media"], score["majority"]) == (0.0, 0.5)
    assert [one.correct for one in said] == [True, False]
    with pytest.raises(DataError, match=f"{task} with 1 query"):
        search(Angles(), hand(task), limit=1)
    assert [one.reference for one in said] == ["0", "90"] and [one.answer for one in said] == ["0", "60"]
    assert all(len(one.media) == 1 and "3" in one.question for one in said)
