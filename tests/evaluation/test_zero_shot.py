"""Prompt ensembles and top-k accuracy by hand, and what is refused."""

from __future__ import annotations

import numpy as np
import pytest

from mllm_jax.errors import ConfigError, DataError
from mllm_jax.evaluation.zero_shot import class_vectors, zero_shot

NAMES, TEMPLATES = ("cat", "dog {x}", "bird"), ("a photo of a {}.", "{}", "many {}s")


def embed(texts) -> np.ndarray:
    """A vector that depends on the text's letters and on nothing else."""
    vectors = [np.random.default_rng(list(text.encode())).normal(size=6) for text in texts]
    return np.stack([v / np.linalg.norm(v) for v in vectors]).astype(np.float32)


def test_a_class_is_the_mean_direction_of_its_sentences():
    found = class_vectors(embed, NAMES, TEMPLATES)
    assert found.shape == (3, 6) and found.dtype == np.float32
    for name, vector in zip(NAMES, found, strict=True):
        mean = np.mean([embed([f"a photo of a {name}."])[0], embed([name])[0], embed([f"many {name}s"])[0]], axis=0)
        np.testing.assert_allclose(vector, mean / np.linalg.norm(mean), atol=1e-6)


def test_top_k_by_hand():
    classes = np.eye(4, dtype=np.float32)
    images = np.array([[0.9, 0.3, 0.2, 0.1], [0.1, 0.9, 0.3, 0.2], [0.4, 0.3, 0.2, 0.9], [0.5, 0.5, 0.5, 0.5]])
    images /= np.linalg.norm(images, axis=1, keepdims=True)
    labels = [0, 2, 2, 1]  # first; second; last; tied with all
    found = zero_shot(images, classes, labels, ks=(1, 2, 3, 4), chunk=3)
    assert found == {"top1": 0.25, "top2": 0.5, "top3": 0.5, "top4": 1.0}


@pytest.mark.parametrize(
    ("names", "templates", "shown"),
    [((), TEMPLATES, "0 class names"), (NAMES, (), "0 templates"), (NAMES, ("a photo",), "a photo"),
     (NAMES, ("{} and {}",), "{} and {}")],
)  # fmt: skip
def test_templates_that_are_refused(names, templates, shown):
    with pytest.raises(ConfigError, match=shown):
        class_vectors(embed, names, templates)


def test_vectors_that_cancel_are_refused():
    def opposite(texts):
        return embed(["x"]) * np.where(np.arange(len(texts)) % 2, -1, 1)[:, None]

    with pytest.raises(DataError, match="mean is 0"):
        class_vectors(opposite, ["cat"], TEMPLATES[:2])


@pytest.mark.parametrize("labels", [[0, 1], [0, 1, 3], [-1, 0, 1], [0.0, 1.0, 2.0]])
def test_labels_that_are_no_classes_are_refused(labels):
    with pytest.raises(DataError, match="from 0 to 2"):
        zero_shot(embed("abc"), embed("def"), labels)
