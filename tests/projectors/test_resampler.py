"""The resampler: its options and refusals."""

from __future__ import annotations

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from mllm_jax.checkpoints.fields import change_fields
from mllm_jax.errors import ConfigError, DataError
from mllm_jax.layers.compute import Compute
from mllm_jax.models.registry import abstract_init
from mllm_jax.projectors.resampler import ResamplerConfig
from mllm_jax.sharding.logical import RULES

C = ResamplerConfig(output_size=12, hidden_size=8, num_queries=4, head_dim=4)
PERCEIVER = change_fields(
    C, num_queries=3, num_layers=2, positions="none", attends_itself=True, residual=True, mlp_size=10
)
FEATURES = np.random.default_rng(0).normal(size=(2, 9, 5)).astype(np.float32)


def random_params(config, features=FEATURES):
    rng = np.random.default_rng(1)
    abstract = nn.meta.unbox(abstract_init(config.make(), features))
    return jax.tree.map(lambda x: 0.5 * rng.normal(size=x.shape).astype(np.float32), abstract)


@pytest.mark.parametrize("config", [C, PERCEIVER], ids=["cross-attention", "perceiver"])
def test_gradients_reach_everything_but_fixed_positions(config):
    params, weights = random_params(config), np.random.default_rng(2).normal(size=(2, config.num_queries, 12))

    def gradient(config):
        def loss(params):
            return (config.make().apply({"params": params}, FEATURES) * weights).sum()

        return jax.jit(jax.grad(loss))(params)

    grads = gradient(config)
    sizes = {
        jax.tree_util.keystr(path): float(jnp.abs(leaf).max())
        for path, leaf in jax.tree_util.tree_leaves_with_path(grads)
    }
    still = {path for path, size in sizes.items() if size < 1e-5}
    # A bias equal for all keys cancels in the softmax.
    assert still == {"['layers']['k']['bias']"} | ({"['positions']"} if config is C else set())
    remat = gradient(replace(config, compute=Compute(remat="full")))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), grads, remat)


def test_every_parameter_has_logical_names_and_bfloat16_computes_in_it():
    for config in (C, change_fields(PERCEIVER, norm="rms", qk_norm=True, num_heads=2, num_kv_heads=1)):
        abstract = abstract_init(config.make(), FEATURES)
        for box in jax.tree.leaves(abstract, is_leaf=lambda x: isinstance(x, nn.meta.AxisMetadata)):
            assert len(box.names) == box.value.ndim and set(box.names) - {None} <= set(RULES)
        half = replace(config, compute=Compute(dtype="bfloat16")).make()
        out = jax.eval_shape(half.apply, {"params": nn.meta.unbox(abstract)}, FEATURES)
        assert out.dtype == jnp.bfloat16 and out.shape == (2, config.num_tokens(3), 12)


def test_positions_distinguish_patches():
    """Checks that the order of the patches matters with positions, and does not without."""
    order = np.array([8, 3, 1, 0, 7, 2, 4, 6, 5])
    for config, same in ((C, False), (PERCEIVER, True)):
        params = random_params(config)
        outs = [config.make().apply({"params": params}, x) for x in (FEATURES, FEATURES[:, order])]
        assert np.allclose(*outs, atol=1e-5) == same


def test_patches_without_a_grid_are_refused():
    with pytest.raises(DataError, match="10 vectors of a"):
        C.make().init(jax.random.key(0), np.zeros((1, 10, 5), np.float32))
    assert nn.meta.unbox(abstract_init(PERCEIVER.make(), np.zeros((1, 10, 5), np.float32)))


@pytest.mark.parametrize(
    "change,message",
    [
        (dict(num_queries=5), "a square number"),
        (dict(hidden_size=6, head_dim=2), "a multiple of 4"),
        (dict(head_dim=3), "heads that fill it"),
        (dict(num_heads=3, num_kv_heads=2), "that the key-value heads divide"),
        (dict(output_map=False), "hidden_size 8 and output_size 12 without a map"),
        (dict(positions="learned"), "positions 'learned'"),
        (dict(norm="batch"), "norm 'batch'"),
        (dict(activation="sine"), "activation 'sine'"),
        (dict(num_layers=0), "at least one of each"),
    ],
    ids=lambda x: "",
)
def test_impossible_configs_are_refused(change, message):
    with pytest.raises(ConfigError, match=message):
        change_fields(C, **change)
