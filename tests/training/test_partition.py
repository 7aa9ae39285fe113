"""Trainable and frozen trees: two halves that add up to the whole."""

from __future__ import annotations

import jax
import numpy as np
import pytest

from mllm_jax.errors import ConfigError
from mllm_jax.training.partition import join, num_bytes, num_parameters, split

PARAMS = {
    "encoder_image": {
        "layers": {"attention": {"kernel": np.zeros((2, 3), np.float32)}},
        "bias": np.zeros(3, np.float16),
    },
    "projector_image": {"linear_1": {"kernel": np.ones((3, 4), np.float32), "bias": np.ones(4, np.float32)}},
    "llm": {"final_norm": {"scale": np.full(5, 2, np.float32)}},
}


def paths(tree) -> set[str]:
    return {jax.tree_util.keystr(path, simple=True, separator="/") for path, _ in jax.tree.leaves_with_path(tree)}


@pytest.mark.parametrize(
    "patterns,trainable",
    [
        (("projector_image/*",), {"projector_image/linear_1/kernel", "projector_image/linear_1/bias"}),
        (("*/bias",), {"projector_image/linear_1/bias", "encoder_image/bias"}),
        (("llm/*", "encoder_image/layers/*"), {"llm/final_norm/scale", "encoder_image/layers/attention/kernel"}),
        (("*",), paths(PARAMS)),
        ((), set()),
    ],
)
def test_split_and_join_are_the_identity(patterns, trainable):
    ours, frozen = split(PARAMS, patterns)
    assert paths(ours) == trainable and paths(frozen) == paths(PARAMS) - trainable
    for tree in (join(ours, frozen), join(frozen, ours)):
        assert jax.tree.structure(tree) == jax.tree.structure(PARAMS)
        assert all(a is b for a, b in zip(jax.tree.leaves(tree), jax.tree.leaves(PARAMS), strict=True))


@pytest.mark.parametrize("pattern", ["projektor/*", "llm", "LLM/*"])
def test_a_pattern_without_match_is_refused(pattern):
    with pytest.raises(ConfigError) as refusal:
        split(PARAMS, ("projector_image/*", pattern))
    assert repr(pattern) in refusal.value.given
    assert "projector_image/linear_1" in refusal.value.expected, "the paths that exist are named"


@pytest.mark.parametrize("old,new", [("projector/*", "projector_image/*"), ("text_tower/*", "encoder_text/*")])
def test_an_old_name_is_refused_with_the_new_one(old, new):
    with pytest.raises(ConfigError) as refusal:
        split(PARAMS, (old,))
    assert repr(old) in refusal.value.given and repr(new) in refusal.value.todo
    assert refusal.value.todo


def test_counts():
    assert num_parameters(PARAMS) == 6 + 3 + 12 + 4 + 5
    assert num_bytes(PARAMS) == 4 * (6 + 12 + 4 + 5) + 2 * 3
    assert num_bytes({}) == num_parameters({}) == 0
