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


def test_each_region_has_a_linear_map_of_its_own():
    """Six patches a side, three regions: nine vectors, each from its own 2 x 2 patches by its own kernel."""
    sizes = SMALL | dict(image_size=24)
    module = ViTConfig(**sizes, regions=3, region_size=5).make()
    pixels = np.random.default_rng(0).normal(size=(2, 24, 24, 3)).astype(np.float32)
    params = random_params(module, pixels)
    kernel = params["params"]["region_pooling"]["kernel"]
    assert kernel.shape == (9, 4 * 12, 5)
    out = jax.jit(module.apply)(params, pixels)
    rest = {name: leaf for name, leaf in params["params"].items() if name != "region_pooling"}
    patches = np.asarray(jax.jit(ViTConfig(**sizes).make().apply)({"params": rest}, pixels).last_hidden_state)
    wanted = np.zeros((2, 9, 5))
    for region in range(9):
        row, column = 2 * (region // 3), 2 * (region % 3)
        members = [6 * (row + i) + column + j for i in range(2) for j in range(2)]
        for b in range(2):
            wanted[b, region] = np.concatenate(patches[b, members]) @ kernel[region]
    np.testing.assert_allclose(out.last_hidden_state, wanted, atol=2e-4)
    np.testing.assert_allclose(out.pooler_output, wanted.mean(axis=1), atol=2e-4)


def test_region_maps_keep_the_scale_of_what_they_read():
    """The fan-in of a map is one region's patches, not those of all regions."""
    module = ViTConfig(**SMALL | dict(image_size=24), regions=3, region_size=50).make()
    params = nn.meta.unbox(jax.jit(module.init)(jax.random.key(0), jnp.zeros((1, 24, 24, 3))))
    kernel = np.asarray(params["params"]["region_pooling"]["kernel"])
    assert kernel.std() == pytest.approx((4 * 12) ** -0.5, rel=0.05)
    assert all(np.abs(kernel[0] - other).max() > 0.1 for other in kernel[1:])


@pytest.mark.parametrize("regions,side", [(None, 6), (1, 1), (2, 2), (6, 6)])
def test_the_grid_is_what_comes_out(regions, side):
    config = ViTConfig(**SMALL | dict(image_size=24), regions=regions, region_size=12)
    module, pixels = config.make(), jnp.zeros((1, 24, 24, 3))
    abstract = jax.eval_shape(module.init_with_output, jax.random.key(0), pixels)[0]
    assert config.grid == side and abstract.last_hidden_state.shape == (1, side**2, 12)


@pytest.mark.parametrize("change", [dict(regions=2), dict(regions=4), dict(regions=3, class_token=True)])
def test_impossible_regions_are_refused(change):
    with pytest.raises(ConfigError, match="regions that divide the patches, and no class token"):
        ViTConfig(**SMALL | change)


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


def test_mimetic_init_reaches_every_layer_and_changes_no_shape():
    pixels = jnp.zeros((1, 12, 12, 3))
    plain, mimetic = (
        nn.meta.unbox(ViTConfig(**SMALL, mimetic_init=flag).make().init(jax.random.key(0), pixels))["params"]["layers"]
        for flag in (False, True)
    )
    assert jax.tree.map(jnp.shape, plain) == jax.tree.map(jnp.shape, mimetic)

    def alignment(layers):
        q, k = (np.asarray(layers["attention"][name]["kernel"]) for name in "qk")
        products = np.einsum("lenh,lfnh->lef", q, k)
        return np.trace(products, axis1=1, axis2=2) / np.linalg.norm(products, axis=(1, 2))

    assert (np.abs(alignment(plain)) < 1).all() and (alignment(mimetic) > 1.5).all()
