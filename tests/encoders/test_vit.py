"""The ViT's sizes, its refusals and what it pools."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from mllm_jax.encoders.vit import ViTConfig
from mllm_jax.errors import ConfigError

SMALL = dict(image_size=12, patch_size=4, hidden_size=12, num_layers=1, num_heads=3, mlp_size=16)


def random_params(module, *args):
    """Every parameter random, without compiling `init`."""
    abstract = nn.meta.unbox(jax.eval_shape(lambda: module.init(jax.random.key(0), *args)))
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda x: 0.4 * rng.normal(size=x.shape).astype(np.float32), abstract)


@pytest.mark.parametrize("class_token", [False, True])
def test_shapes_and_pooling(class_token):
    module = ViTConfig(**SMALL, class_token=class_token, stem_channels=(4,)).make()
    pixels = np.random.default_rng(0).normal(size=(2, 12, 12, 3)).astype(np.float32)
    params = random_params(module, pixels)
    out = jax.jit(module.apply)(params, pixels)
    assert out.last_hidden_state.shape == (2, 9 + class_token, 12)
    wanted = out.last_hidden_state[:, 0] if class_token else np.asarray(out.last_hidden_state).mean(axis=1)
    np.testing.assert_allclose(out.pooler_output, wanted, atol=1e-6)
    assert ("class_token" in params["params"]) == class_token


def test_bfloat16_computes_in_bfloat16_with_float32_parameters():
    module = ViTConfig(**SMALL, dtype="bfloat16").make()
    abstract = jax.eval_shape(module.init, jax.random.key(0), jnp.zeros((1, 12, 12, 3)))
    assert {leaf.dtype for leaf in jax.tree.leaves(abstract)} == {jnp.dtype("float32")}
    out = jax.eval_shape(module.apply, nn.meta.unbox(abstract), jnp.zeros((1, 12, 12, 3)))
    assert out.last_hidden_state.dtype == jnp.bfloat16


@pytest.mark.parametrize(
    "change", [dict(image_size=14), dict(patch_size=5), dict(stem_channels=(4, 4, 4))], ids=lambda c: next(iter(c))
)
def test_impossible_sizes_are_refused(change):
    with pytest.raises(ConfigError, match="whole number of patches"):
        ViTConfig(**SMALL | change)
