"""The text tower: padding changes nothing, positions do, and segments of a row do not see each other."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from mllm_jax.encoders.text import TextTowerConfig

CONFIG = TextTowerConfig(vocab_size=31, max_length=8, hidden_size=12, num_layers=2, num_heads=3, mlp_size=20)


def random_params(module, *args):
    """Every parameter random, without compiling `init`."""
    abstract = nn.meta.unbox(jax.eval_shape(lambda: module.init(jax.random.key(0), *args)))
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda x: 0.4 * rng.normal(size=x.shape).astype(np.float32), abstract)


@pytest.fixture(scope="module")
def tower():
    module = CONFIG.make()
    ints = jnp.ones((1, 8), jnp.int32)
    params = random_params(module, ints, ints)
    return jax.jit(lambda tokens, segments: module.apply(params, tokens, segments))


def test_padding_has_no_part(tower):
    tokens = np.array([[5, 6, 7, 8, 0, 0, 0, 0], [5, 6, 7, 8, 9, 11, 13, 30]])
    segments = np.array([[1, 1, 1, 1, 0, 0, 0, 0]] * 2)
    first, second = tower(tokens, segments)
    assert first.shape == (12,)
    np.testing.assert_allclose(first, second, atol=1e-6)
    longer = tower(tokens[1:], np.ones((1, 8), int))[0]
    assert np.abs(longer - second).max() > 1e-2


def test_a_shorter_row_gives_the_same_vector(tower):
    tokens = np.array([[5, 6, 7, 8]])
    padded = np.pad(tokens, [(0, 0), (0, 4)])
    short = tower(tokens, np.ones((1, 4), int))
    np.testing.assert_allclose(short, tower(padded, (padded > 0).astype(int)), atol=1e-6)


def test_order_matters(tower):
    ones = np.ones((1, 4), int)
    assert np.abs(tower(np.array([[5, 6, 7, 8]]), ones) - tower(np.array([[8, 7, 6, 5]]), ones)).max() > 1e-2


def test_an_empty_row_is_finite(tower):
    assert np.isfinite(tower(np.zeros((1, 8), int), np.zeros((1, 8), int))).all()
