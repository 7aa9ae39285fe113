"""Recall at k against a count by hand; ties, chunks and refusals."""

from __future__ import annotations

import numpy as np
import pytest

from mllm_jax.errors import DataError
from mllm_jax.evaluation.retrieval import rank_of_own, retrieval


def units(seed: int, rows: int, size: int = 5) -> np.ndarray:
    x = np.random.default_rng(seed).normal(size=(rows, size))
    return (x / np.linalg.norm(x, axis=1, keepdims=True)).astype(np.float32)


def by_hand(images, texts, owner, k: int) -> tuple[float, float]:
    """Computes recall by sorting, as in the definition; without ties."""
    similarity = images.astype(float) @ texts.astype(float).T
    image_hits = [(owner[np.argsort(-row)[:k]] == i).any() for i, row in enumerate(similarity)]
    text_hits = [owner[j] in np.argsort(-column)[:k] for j, column in enumerate(similarity.T)]
    return np.mean(image_hits), np.mean(text_hits)


@pytest.mark.parametrize("chunk", [1, 7, 1024])
def test_several_texts_an_image(chunk):
    images, texts = units(0, 20), units(1, 50)
    owner = np.concatenate([np.arange(20), np.random.default_rng(2).integers(0, 20, 30)])
    found = retrieval(images, texts, owner, ks=(1, 3, 10), chunk=chunk)
    for k in (1, 3, 10):
        wanted = by_hand(images, texts, owner, k)
        assert (found[f"image_to_text_r{k}"], found[f"text_to_image_r{k}"]) == pytest.approx(wanted)
        assert 0 < wanted[0] < 1 and 0 < wanted[1] < 1, "the example can show a difference"


def test_perfect_and_useless():
    images = units(0, 12, 40)
    assert set(retrieval(images, images).values()) == {1.0}
    constant = np.tile(images[:1], (12, 1))
    found = retrieval(images, constant, ks=(1, 5, 10))
    assert [found[f"image_to_text_r{k}"] for k in (1, 5, 10)] == [0, 0, 0], "a constant answer scores zero"
    # Of 12 equal queries with one order of the images, the k-th finds its own at rank k.
    assert [found[f"text_to_image_r{k}"] for k in (1, 5, 10)] == pytest.approx([1 / 12, 5 / 12, 10 / 12])


def test_equal_vectors_tie_at_any_index():
    """Checks also columns at the edge, which matrix multiplication sums in another order."""
    query = units(3, 1, 515)
    keys = np.tile(units(4, 1, 515), (37, 1))
    ranks = rank_of_own(query, keys, np.array([0]), np.arange(37))
    assert ranks.tolist() == [36]


def test_one_image():
    assert retrieval(units(0, 1), units(0, 1), ks=(1,)) == {"image_to_text_r1": 1.0, "text_to_image_r1": 1.0}


GOOD = units(0, 4)
REFUSED = {
    "not finite": ((np.where(np.arange(4)[:, None] == 2, np.nan, GOOD), GOOD), "number 2"),
    "no unit vectors": ((GOOD, 2 * GOOD), "length 2"),
    "no vectors": ((GOOD[:0], GOOD), r"images: float32\[0, 5\]"),
    "other widths": ((GOOD, units(0, 4, 6)), "one width"),
    "an image without a text": ((GOOD, GOOD, [0, 1, 2, 2]), "each image described"),
    "an unknown image": ((GOOD, GOOD, [0, 1, 2, 4]), "each image described"),
    "too few owners": ((GOOD, GOOD, [0, 1, 2]), "each image described"),
    "more texts than images": ((GOOD, units(1, 5)), "each image described"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_refused(name):
    given, shown = REFUSED[name]
    with pytest.raises(DataError, match=shown):
        retrieval(*given)
