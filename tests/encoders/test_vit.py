"""The ViT: its sizes, options, packed images, hidden layers and refusals."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from einops import rearrange
from flax import linen as nn

from mllm_jax.checkpoints.fields import make_config
from mllm_jax.encoders.vit import VisionOutput, ViTConfig, select_layers
from mllm_jax.errors import ConfigError
from mllm_jax.layers.compute import Compute
from mllm_jax.sharding.logical import RULES

SMALL = dict(image_size=12, patch_size=4, hidden_size=12, num_layers=1, num_heads=3, mlp_size=16)


def random_params(module, *args):
    """Returns random parameters, without compiling `init`."""
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
    """Checks six patches a side and three regions: nine vectors, each from its own 2 x 2 patches by its own kernel."""
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


def test_region_maps_keep_the_scale_of_their_input():
    """Checks that the fan-in of a map is one region's patches, not those of all regions."""
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
        make_config(ViTConfig, **SMALL | change)


def test_bfloat16_computes_in_bfloat16_with_float32_parameters():
    module = ViTConfig(**SMALL, compute=Compute(dtype="bfloat16")).make()
    abstract = jax.eval_shape(module.init, jax.random.key(0), jnp.zeros((1, 12, 12, 3)))
    assert {leaf.dtype for leaf in jax.tree.leaves(abstract)} == {jnp.dtype("float32")}
    out = jax.eval_shape(module.apply, nn.meta.unbox(abstract), jnp.zeros((1, 12, 12, 3)))
    assert out.last_hidden_state.dtype == jnp.bfloat16


@pytest.mark.parametrize(
    "change", [dict(image_size=14), dict(patch_size=5), dict(stem_channels=(4, 4, 4))], ids=lambda c: next(iter(c))
)
def test_impossible_sizes_are_refused(change):
    with pytest.raises(ConfigError, match="whole number of patches"):
        make_config(ViTConfig, **SMALL | change)


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


# ---- whole and packed images

TOWERS = {
    "class token": dict(class_token=True, norm_pooled=True, norm_output=False, pre_norm=True),
    "attention pooling": dict(pooler="attention", activation="gelu_tanh"),
    "rotary": dict(class_token=True, rope_grid=4, attention_sub_norm_eps=1e-6, mlp_sub_norm_eps=1e-6, gated=True),
    "rms": dict(class_token=True, norm="rms", qk_norm=True, layer_scale=0.1, pooler="none", qkv_bias=False),
    "after": dict(norm_first=False, position_antialias=True, pooler="mean", head_size=5, k_bias=False),
}


def pack(images, patch: int, class_token: bool):
    """Packs images of any size into one row, with two positions of padding: pixels, coordinates and the spans."""
    parts, spans, start = [], [], 0
    for number, pixels in enumerate(images, start=1):
        grid = np.array(pixels.shape[:2]) // patch
        patches = rearrange(pixels, "(h p) (w q) c -> (h w) (p q c)", p=patch, q=patch)
        positions = np.indices(grid).reshape(2, -1).T
        if class_token:
            patches = np.concatenate([np.zeros_like(patches[:1]), patches])
            positions = np.concatenate([[[-1, -1]], positions])
        parts.append((patches, np.full(len(patches), number), positions, np.broadcast_to(grid, positions.shape)))
        spans.append(slice(start, start := start + len(patches)))
    parts.append((np.ones_like(parts[0][0][:2]), *(np.zeros(shape) for shape in ((2,), (2, 2), (2, 2)))))
    pixels, segments, coordinates, grids = (np.concatenate(part)[None] for part in zip(*parts, strict=True))
    positions = dict(segments=segments, coordinates=coordinates, grids=grids)
    return pixels.astype(np.float32), {name: array.astype(np.int32) for name, array in positions.items()}, spans


@pytest.mark.parametrize("tower", TOWERS)
def test_packed_images_come_out_as_they_do_alone(tower):
    c = make_config(ViTConfig, **SMALL | TOWERS[tower])
    module, rng = c.make(), np.random.default_rng(0)
    images = [rng.normal(size=(h, w, 3)).astype(np.float32) for h, w in ((12, 12), (8, 20))]
    params = random_params(module, images[0][None])
    apply = jax.jit(module.apply)
    pixels, positions, spans = pack(images, 4, c.class_token)
    together = apply(params, pixels, **positions)
    assert together.pooler_output is None and np.isfinite(together.last_hidden_state).all()
    assert together.class_tokens == (None if c.class_token else 0)
    for image, span in zip(images, spans, strict=True):
        alone = apply(params, image[None]).last_hidden_state[0]
        np.testing.assert_allclose(together.last_hidden_state[0, span], alone, atol=2e-5 * np.abs(alone).max())
    # Another second image and other padding change nothing in the first.
    other = np.array(pixels)
    other[0, spans[1].start :] = 7.0
    first = apply(params, other, **positions).last_hidden_state[0, spans[0]]
    np.testing.assert_array_equal(first, together.last_hidden_state[0, spans[0]])


def test_gradients_of_packed_images_are_finite_and_ignore_padding():
    c = make_config(ViTConfig, **SMALL | TOWERS["rotary"])
    module = c.make()
    image = np.random.default_rng(0).normal(size=(8, 12, 3)).astype(np.float32)
    params = random_params(module, np.zeros((1, 12, 12, 3), np.float32))
    pixels, positions, (span,) = pack([image], 4, True)

    def loss(params, pixels, **positions):
        x = module.apply(params, pixels, **positions).last_hidden_state
        return jnp.square(x[:, :7]).sum()

    packed = jax.jit(jax.grad(loss))(params, pixels, **positions)
    alone = jax.jit(jax.grad(loss))(params, image[None])
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-3 * (1 + np.abs(b).max())), packed, alone)


def test_every_parameter_names_its_axes():
    for switches in TOWERS.values():
        boxed = jax.eval_shape(
            make_config(ViTConfig, **SMALL | switches).make().init, jax.random.key(0), jnp.zeros((1, 12, 12, 3))
        )
        for box in jax.tree.leaves(boxed, is_leaf=lambda x: isinstance(x, nn.LogicallyPartitioned)):
            assert isinstance(box, nn.LogicallyPartitioned) and len(box.names) == box.value.ndim
            assert set(box.names) - {None} <= set(RULES)


# ---- hidden layers


@pytest.mark.parametrize("class_token", [False, True])
def test_selected_layers(class_token):
    module = ViTConfig(**SMALL | dict(num_layers=3, class_token=class_token)).make()
    pixels = np.random.default_rng(0).normal(size=(2, 12, 12, 3)).astype(np.float32)
    params = random_params(module, pixels)
    output = jax.jit(module.apply, static_argnums=2)(params, pixels, True)
    assert len(output.hidden_states) == 4
    one = select_layers(output, -2)
    np.testing.assert_array_equal(one, output.hidden_states[2][:, int(class_token) :])
    assert one.shape == (2, 9, 12)
    several = select_layers(output, (0, 3), keep_class_token=True)
    assert several.shape == (2, 9 + class_token, 24)
    np.testing.assert_array_equal(several[..., 12:], output.hidden_states[3])
    plain = jax.jit(module.apply)(params, pixels)
    assert plain.hidden_states is None
    np.testing.assert_allclose(plain.last_hidden_state, output.last_hidden_state, atol=1e-6)


@pytest.mark.parametrize("layers", [4, -5, (), (0, 9)])
def test_layers_that_are_not_there_are_refused(layers):
    output = VisionOutput(jnp.zeros((1, 2, 3)), None, tuple(jnp.zeros((1, 2, 3)) for _ in range(4)))
    with pytest.raises(ConfigError, match="of 4"):
        select_layers(output, layers)
    with pytest.raises(ConfigError, match="without any"):
        select_layers(VisionOutput(jnp.zeros((1, 2, 3))), layers)


def test_class_tokens_among_patches_cannot_be_dropped():
    output = VisionOutput(jnp.zeros((1, 2, 3)), None, (jnp.ones((1, 2, 3)),), class_tokens=None)
    assert select_layers(output, 0, keep_class_token=True).shape == (1, 2, 3)
    with pytest.raises(ConfigError, match="coordinates -1"):
        select_layers(output, 0)


# ---- bad input

POSITIONS = dict(segments=jnp.ones((1, 2), int), coordinates=jnp.zeros((1, 2, 2), int), grids=jnp.ones((1, 2, 2), int))


@pytest.mark.parametrize(
    "switches,shape,positions,message",
    [
        ({}, (1, 12, 12, 4), {}, "with 4 channels"),
        ({}, (1, 12, 12, 1), {}, "with 1 channels"),
        ({}, (1, 12, 14, 3), {}, "whole number of patches"),
        ({}, (1, 0, 12, 3), {}, "whole number of patches"),
        (dict(drop_remainder=True), (1, 3, 12, 3), {}, "whole number of patches"),
        ({}, (12, 12, 3), {}, "nothing else"),
        ({}, (1, 12, 12, 3), POSITIONS, "packed patches"),
        ({}, (1, 2, 48), POSITIONS | dict(grids=None), "segments, coordinates"),
        ({}, (1, 2, 47), POSITIONS, "patches of 47 numbers"),
        (dict(stem_channels=(4,)), (1, 2, 48), POSITIONS, "convolutional stem"),
        (dict(regions=3), (1, 2, 48), POSITIONS, "regions on packed patches"),
        (dict(regions=3), (1, 24, 12, 3), {}, "3 regions"),
    ],
)
def test_pixels_that_do_not_fit_are_refused(switches, shape, positions, message):
    module = make_config(ViTConfig, **SMALL | switches).make()
    params = jax.eval_shape(module.init, jax.random.key(0), jnp.zeros((1, 12, 12, 3)))
    with pytest.raises(ConfigError, match=message):
        jax.eval_shape(lambda p, x: module.apply(p, x, **positions), nn.meta.unbox(params), jnp.zeros(shape))


def test_what_fills_no_patch_is_left_out_where_asked():
    c = make_config(ViTConfig, **SMALL | dict(image_size=14, drop_remainder=True))
    module, pixels = c.make(), np.random.default_rng(0).normal(size=(1, 15, 13, 3)).astype(np.float32)
    params = random_params(module, pixels)
    assert c.side == 3
    ours = module.apply(params, pixels).last_hidden_state
    np.testing.assert_array_equal(ours, module.apply(params, pixels[:, :12, :12]).last_hidden_state)


@pytest.mark.parametrize(
    "change,message",
    [
        (dict(num_heads=5), "heads that divide it"),
        (dict(rope_grid=4, num_heads=6), "multiple of 4"),
        (dict(pooler="token"), "without a class token"),
        (dict(pooler="none", head_size=4), "pooler 'none'"),
        (dict(pooler="max"), "one of auto"),
        (dict(norm="batch"), "one of layer, rms"),
        (dict(activation="mish"), "one of gelu"),
        (dict(head_activation="mish"), "one of None, gelu"),
    ],
)
def test_impossible_switches_are_refused(change, message):
    with pytest.raises(ConfigError, match=message):
        make_config(ViTConfig, **SMALL | change)
