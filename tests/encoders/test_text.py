"""The text encoder: padding changes nothing, positions do, and segments of a row are independent."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from mllm_jax.checkpoints.fields import change_fields
from mllm_jax.encoders.text_encoder import TextTowerConfig
from mllm_jax.errors import ConfigError

CONFIG = TextTowerConfig(vocab_size=31, max_length=8, hidden_size=12, num_layers=2, num_heads=3, mlp_size=20)


def random_params(module, *args):
    """Returns random parameters, without compiling `init`."""
    abstract = nn.meta.unbox(jax.eval_shape(lambda: module.init(jax.random.key(0), *args)))
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda x: 0.4 * rng.normal(size=x.shape).astype(np.float32), abstract)


@pytest.fixture(scope="module")
def tower():
    module = CONFIG.make()
    ints = jnp.ones((1, 8), jnp.int32)
    params = random_params(module, ints, ints, ints)

    def embed(tokens, segments):
        tokens = jnp.asarray(tokens)
        positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
        return module.apply(params, tokens, positions, segments)[:, 0]

    return jax.jit(embed)


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


@pytest.mark.parametrize("num_layers", [0, 2])
def test_texts_packed_into_a_row_give_the_vectors_of_each_alone(num_layers):
    module = dataclasses.replace(CONFIG, num_layers=num_layers).make()
    ints = jnp.ones((1, 8), jnp.int32)
    params = random_params(module, ints, ints, ints)
    tokens = np.array([[5, 6, 7, 9, 8, 0, 0, 0]])
    positions, segments = np.array([[0, 1, 2, 0, 1, 0, 0, 0]]), np.array([[1, 1, 1, 2, 2, 0, 0, 0]])
    packed = module.apply(params, tokens, positions, segments, 3)
    assert packed.shape == (1, 3, 12)
    for number, span in enumerate([slice(0, 3), slice(3, 5)]):
        alone = module.apply(params, tokens[:, span], positions[:, span], np.ones_like(tokens[:, span]))
        np.testing.assert_allclose(packed[0, number], alone[0, 0], atol=1e-6)
    assert (np.asarray(packed[0, 2]) == 0).all(), "there is no third text"


def test_without_layers_it_is_a_bag_of_words():
    module = dataclasses.replace(CONFIG, num_layers=0).make()
    ints = jnp.ones((1, 4), jnp.int32)
    params = random_params(module, ints, ints, ints)
    assert "position_embedding" not in params["params"] and "layers" not in params["params"]
    ones, positions = np.ones((1, 4), int), np.arange(4)[None]
    one, other = (module.apply(params, np.array([t]), positions, ones) for t in ([5, 6, 7, 8], [8, 7, 6, 5]))
    np.testing.assert_allclose(one, other, atol=1e-6)


@pytest.mark.parametrize("mask", ["full", "causal"])
@pytest.mark.parametrize("pooling", ["last", "eos", "largest"])
def test_poolings_of_packed_texts(mask, pooling):
    """Checks that each text's vector is that of its pooled position, packed or alone."""
    config = change_fields(CONFIG, mask=mask, pooling=pooling, eos_token_id=9, projection_size=5)
    module = config.make()
    ints = jnp.ones((1, 8), jnp.int32)
    params = random_params(module, ints, ints, ints)
    texts = [[5, 6, 9, 9, 7], [30, 2]]  # two ends; none, so the first position is used
    tokens, positions = np.array([[*texts[0], *texts[1], 0]]), np.array([[*range(5), 0, 1, 0]])
    packed = module.apply(params, tokens, positions, np.array([[1] * 5 + [2, 2, 0]]), 2)
    assert packed.shape == (1, 2, 5)
    hidden = module.clone(config=change_fields(config, projection_size=None))
    kernel = params["params"]["projection"]["kernel"]
    trunk = {"params": {k: v for k, v in params["params"].items() if k != "projection"}}
    for number, text in enumerate(texts):
        row, positions, ones = np.array([text]), np.arange(len(text))[None], np.ones((1, len(text)), int)
        member = ones[:, None] > 0
        states = hidden.apply(trunk, row, positions, ones, None, member, method="run").last_hidden_state[0]
        selected = {"last": (4, 1), "eos": (2, 0), "largest": (2, 0)}[pooling][number]
        np.testing.assert_allclose(packed[0, number], states[selected] @ kernel, atol=1e-5)


def test_switches_that_are_refused():
    for change, shown in (
        (dict(mask="half"), "half"),
        (dict(pooling="first"), "first"),
        (dict(activation="sine"), "sine"),
        (dict(pooling="eos"), "eos_token_id"),
        (dict(num_heads=5), "5 heads"),
    ):
        with pytest.raises(ConfigError, match=shown):
            change_fields(CONFIG, **change)
    assert dataclasses.replace(CONFIG, num_heads=5, num_layers=0), "a bag of words has no heads"
