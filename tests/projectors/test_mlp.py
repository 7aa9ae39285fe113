"""The MLP projector: the patches of each media token."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from mllm_jax.errors import ConfigError
from mllm_jax.projectors.mlp import MLPProjectorConfig


def test_a_media_token_is_made_of_its_own_square_of_patches():
    """Checks that a change of one patch of a 6 x 6 grid moves the one token whose 2 x 2 square contains it."""
    c = MLPProjectorConfig(output_size=5, merge=2, input_norm=True)
    module = c.make()
    features = np.random.default_rng(0).normal(size=(1, 36, 4)).astype(np.float32)
    abstract = nn.meta.unbox(jax.eval_shape(lambda: module.init(jax.random.key(0), features)))
    params = jax.tree.map(lambda x: np.random.default_rng(x.size).normal(size=x.shape).astype(np.float32), abstract)
    apply = jax.jit(module.apply)
    before = apply(params, features)
    assert before.shape == (1, 9, 5) == (1, c.num_tokens(6), 5)
    for row, column in [(0, 0), (1, 2), (4, 3), (5, 5)]:
        other = features.copy()
        other[0, row * 6 + column, 0] += 1.0  # one channel only: the norm would cancel a shift of all
        after = apply(params, other)
        moved = np.flatnonzero(np.abs(after - before).max(axis=-1)[0] > 1e-6)
        assert moved.tolist() == [(row // 2) * 3 + column // 2]


def test_hidden_size_defaults_to_the_output():
    x = jnp.zeros((1, 4, 3))
    shapes = [
        jax.eval_shape(MLPProjectorConfig(7, hidden_size=hidden).make().init, jax.random.key(0), x)["params"]
        for hidden in (None, 9)
    ]
    assert [s["linear_1"]["kernel"].value.shape for s in shapes] == [(3, 7), (3, 9)]


@pytest.mark.parametrize("layers,bias", [(1, True), (3, False)])
def test_any_number_of_linear_maps(layers, bias):
    c = MLPProjectorConfig(output_size=5, hidden_size=6, num_layers=layers, use_bias=bias, activation="relu")
    x = np.random.default_rng(0).normal(size=(2, 4, 3)).astype(np.float32)
    params = nn.meta.unbox(c.make().init(jax.random.key(0), x))["params"]
    wanted = x
    assert sorted(params) == [f"linear_{n}" for n in range(1, layers + 1)]
    for n in range(1, layers + 1):
        assert ("bias" in params[f"linear_{n}"]) == bias
        params[f"linear_{n}"] = {name: value + 0.1 for name, value in params[f"linear_{n}"].items()}
        wanted = wanted @ params[f"linear_{n}"]["kernel"] + params[f"linear_{n}"].get("bias", 0)
        wanted = wanted if n == layers else np.maximum(wanted, 0)
    np.testing.assert_allclose(c.make().apply({"params": params}, x), wanted, atol=1e-5)


@pytest.mark.parametrize("wrong", [dict(num_layers=0), dict(activation="sine")])
def test_what_makes_no_projector_is_refused(wrong):
    with pytest.raises(ConfigError, match="MLP projector"):
        MLPProjectorConfig(5, **wrong)


def test_place_embeddings_tell_equal_features_apart():
    c = MLPProjectorConfig(output_size=5, place_embedding=True)
    module, features = c.make(), np.ones((2, 4, 3), np.float32)
    params = nn.meta.unbox(module.init(jax.random.key(0), features))
    table = params["params"].pop("place_embedding")
    assert table.shape == (4, 5) and 0.1 < table.std() < 0.6
    bare = MLPProjectorConfig(output_size=5).make().apply(params, features)
    moved = module.apply({"params": params["params"] | {"place_embedding": table}}, features) - bare
    np.testing.assert_allclose(moved, np.broadcast_to(table, (2, 4, 5)), atol=1e-6)
