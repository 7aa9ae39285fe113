"""The UNet of Stable Diffusion against diffusers' UNet2DConditionModel, through real folders both ways."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from diffusers import UNet2DConditionModel
from flax import linen as nn
from unet_checks import check, check_full_size, inputs

from mllm_jax.errors import ConfigError
from mllm_jax.generators.unet import UNetConfig
from mllm_jax.generators.unet_blocks import TextStates, UNetAttention, resize_nearest
from mllm_jax.generators.unet_hub import from_hf_config, sample
from mllm_jax.generators.unet_time import embed_time
from mllm_jax.sharding.logical import use_mesh
from mllm_jax.sharding.mesh import MeshConfig, make_mesh, param_shardings

CROSS, PLAIN = "CrossAttnDownBlock2D", "DownBlock2D"
UP_CROSS, UP_PLAIN = "CrossAttnUpBlock2D", "UpBlock2D"
TINY = dict(
    block_out_channels=(8, 16), layers_per_block=1, cross_attention_dim=12, attention_head_dim=4, norm_num_groups=4,
    down_block_types=(CROSS, PLAIN), up_block_types=(UP_PLAIN, UP_CROSS), sample_size=8,
)  # fmt: skip
# Options of diffusers' class, height and width of the latents, and whether the text has a mask.
CASES = {
    "SD 1": (TINY, (8, 12), False),
    "SD 2": (
        TINY | dict(
            attention_head_dim=(2, 3), use_linear_projection=True, upcast_attention=True, only_cross_attention=True,
            block_out_channels=(16, 8), down_block_types=(CROSS, CROSS), up_block_types=(UP_CROSS, UP_CROSS),
        ),
        (7, 10), True,
    ),
    "scale_shift, uneven layers, three resolutions": (
        TINY | dict(
            resnet_time_scale_shift="scale_shift", layers_per_block=(2, 1, 1), attention_head_dim=(2, 4, 5),
            block_out_channels=(8, 16, 12), down_block_types=(CROSS, PLAIN, PLAIN), norm_eps=0.1, act_fn="mish",
            up_block_types=(UP_CROSS, UP_PLAIN, UP_PLAIN), transformer_layers_per_block=(2, 1, 0),
            mid_block_type="UNetMidBlock2D", only_cross_attention=(True, False, True),
        ),
        (9, 13), True,
    ),
    "no middle": (
        TINY | dict(
            mid_block_type=None, center_input_sample=True, flip_sin_to_cos=False, freq_shift=1, downsample_padding=0,
            conv_in_kernel=5, conv_out_kernel=1, in_channels=3, out_channels=6, time_embedding_dim=20,
            timestep_post_act="gelu", time_embedding_act_fn="relu", time_cond_proj_dim=5, act_fn="Swish",
            attention_head_dim=3, num_class_embeds=7,
        ),
        (11, 5), False,
    ),
    "vectors as classes": (
        TINY | dict(
            class_embed_type="projection", projection_class_embeddings_input_dim=6, class_embeddings_concat=True,
            mid_block_scale_factor=1.5, sample_size=(4, 6), transformer_layers_per_block=((1,), (2,)),
            reverse_transformer_layers_per_block=((1, 0), (1, 2)), block_out_channels=(16, 8), dropout=0.1,
            down_block_types=(PLAIN, CROSS), up_block_types=(UP_CROSS, UP_PLAIN),
        ),
        (4, 6), False,
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_output_gradients_and_folders_both_ways(case, randomise, assert_close, tmp_path):
    options, size, masked = CASES[case]
    check(randomise(UNet2DConditionModel(**options)), size, tmp_path, assert_close, masked)


def test_full_size_parameters():
    """Checks names and shapes against diffusers'; the first number is that of the published weights."""
    with torch.device("meta"):
        one = UNet2DConditionModel(cross_attention_dim=768, sample_size=64)
        two = UNet2DConditionModel(
            cross_attention_dim=1024, attention_head_dim=(5, 10, 20, 20), use_linear_projection=True
        )
    assert check_full_size(one, from_hf_config, 859_520_964) == UNetConfig()
    check_full_size(two, from_hf_config, 865_910_724)


def test_two_devices_compute_the_same():
    config = from_hf_config({name: list(v) if isinstance(v, tuple) else v for name, v in TINY.items()})
    module = config.make()
    boxed = jax.eval_shape(module.init, jax.random.key(0), *sample(config))["params"]
    assert not [leaf for leaf in jax.tree.leaves(boxed, is_leaf=_is_boxed) if not _is_boxed(leaf)]
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda x: rng.normal(size=x.shape, scale=0.3).astype(np.float32), nn.meta.unbox(boxed))
    call = inputs(config, (8, 6))
    wanted = jax.jit(module.apply)({"params": params}, **call)
    for axes in (dict(fsdp=2), dict(tensor=2)):
        mesh = make_mesh(MeshConfig(data=1, **axes), jax.devices()[:2])
        placed = jax.device_put(params, param_shardings(boxed, mesh))
        split = [leaf for leaf in jax.tree.leaves(placed) if not leaf.sharding.is_fully_replicated]
        assert len(split) > 20
        with use_mesh(mesh):
            found = jax.jit(module.apply)({"params": placed}, **call)
        np.testing.assert_allclose(found, wanted, rtol=0, atol=2e-5 * np.abs(wanted).max())


def _is_boxed(leaf) -> bool:
    return isinstance(leaf, nn.LogicallyPartitioned)


@pytest.mark.parametrize("sizes", [((5, 4), (10, 7)), ((4, 9), (9, 4)), ((3, 3), (11, 6)), ((7, 5), (7, 5))])
def test_nearest_pixels(sizes):
    (height, width), new = sizes
    x = np.arange(height * width * 2, dtype=np.float32).reshape(1, height, width, 2)
    wanted = torch.nn.functional.interpolate(torch.tensor(x).permute(0, 3, 1, 2), size=new, mode="nearest")
    np.testing.assert_array_equal(resize_nearest(jnp.asarray(x), *new), wanted.permute(0, 2, 3, 1).numpy())


def test_a_text_that_is_masked_whole_is_read_whole():
    """Checks the published arithmetic: masked scores are lowered by 10,000, which float32 rounds to 0.001."""
    rng = np.random.default_rng(0)
    x, text = (jnp.asarray(rng.normal(size=(2, length, 8)), jnp.float32) for length in (6, 5))
    module = UNetAttention(num_heads=2, head_dim=4)
    variables = module.init(jax.random.key(0), x, TextStates(text))
    masked = module.apply(variables, x, TextStates(text, jnp.asarray([[0] * 5, [1, 1, 0, 0, 0]])))
    np.testing.assert_allclose(masked[0], module.apply(variables, x, TextStates(text))[0], atol=2e-3)
    np.testing.assert_allclose(masked[1], module.apply(variables, x, TextStates(text[:, :2]))[1], atol=1e-6)


def test_time_of_an_odd_width():
    found = np.asarray(embed_time(jnp.asarray([0, 999]), 5, flip_sin_to_cos=True, freq_shift=0.0))
    np.testing.assert_allclose(found[:, 4], 0)
    np.testing.assert_allclose(found[0, :4], [1, 1, 0, 0])
    np.testing.assert_allclose(found[1, :4], [np.cos(999), np.cos(9.99), np.sin(999), np.sin(9.99)], atol=1e-4)


HUB = {name: list(value) if isinstance(value, tuple) else value for name, value in TINY.items()}


@pytest.mark.parametrize(
    "name,value",
    [
        ("dual_cross_attention", True),
        ("num_attention_heads", 4),
        ("encoder_hid_dim", 5),
        ("encoder_hid_dim_type", "text_proj"),
        ("addition_embed_type", "text_time"),
        ("addition_time_embed_dim", 8),
        ("resnet_skip_time_act", True),
        ("resnet_out_scale_factor", 2.0),
        ("resnet_time_scale_shift", "spatial"),
        ("time_embedding_type", "fourier"),
        ("attention_type", "gated"),
        ("mid_block_only_cross_attention", True),
        ("cross_attention_norm", "layer_norm"),
        ("class_embed_type", "other"),
        ("act_fn", "tanh"),
        ("act_fn", None),
        ("norm_num_groups", None),
        ("mid_block_type", "UNetMidBlock2DSimpleCrossAttn"),
        ("down_block_types", ["AttnDownBlock2D", PLAIN]),
        ("up_block_types", [UP_PLAIN, "SimpleCrossAttnUpBlock2D"]),
        ("cross_attention_dim", [12, 16]),
        ("cross_attention_dim", [[12, 12], 12]),
        ("cross_attention_dim", "12"),
        ("attention_head_dim", [4, 4, 4]),
        ("attention_head_dim", 100),
        ("layers_per_block", [1]),
        ("layers_per_block", 10**9),
        ("only_cross_attention", [True, 1]),
        ("transformer_layers_per_block", [[1], 1]),
        ("transformer_layers_per_block", [1, []]),
        ("sample_size", [8, 8, 8]),
        ("norm_num_groups", 3),
        ("freq_shift", 4),
        ("projection_class_embeddings_input_dim", 4),
        ("a_new_option", 1),
    ],
)
def test_unsupported_options_are_refused_by_name(name, value):
    config = HUB | {name: value}
    if name == "cross_attention_dim":
        config["down_block_types"] = [CROSS, CROSS]
    with pytest.raises(ConfigError, match=name.removesuffix("_types").replace("_type", "")):
        from_hf_config(config)


@pytest.mark.parametrize(
    "name,shape",
    [
        ("latents", (2, 4, 8, 12)),
        ("latents", (8, 12, 4)),
        ("timesteps", (3,)),
        ("text", (2, 5, 11)),
        ("text", (1, 5, 12)),
        ("text_mask", (2, 4)),
        ("class_labels", (2,)),
        ("timestep_cond", (2, 4)),
    ],
)
def test_wrong_shapes_are_named(name, shape):
    config = from_hf_config(HUB)
    call = inputs(config, (8, 12)) | {name: np.ones(shape, np.float32)}
    with pytest.raises(ConfigError, match=name):
        jax.eval_shape(config.make().init, jax.random.key(0), **call)
