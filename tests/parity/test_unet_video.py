"""The UNet of Zeroscope against diffusers' UNet3DConditionModel, through real folders both ways."""

from __future__ import annotations

import jax
import numpy as np
import pytest
import torch
from diffusers import UNet3DConditionModel
from flax import linen as nn
from unet_checks import check, check_full_size, inputs, theirs

from mllm_jax.errors import ConfigError
from mllm_jax.generators.unet_blocks import Style
from mllm_jax.generators.unet_temporal import TemporalConvolutions
from mllm_jax.generators.unet_video import VideoUNetConfig
from mllm_jax.generators.unet_video_hub import from_hf_config, sample
from mllm_jax.layers.compute import with_compute
from mllm_jax.sharding.logical import use_mesh
from mllm_jax.sharding.mesh import MeshConfig, make_mesh, param_shardings

CROSS, PLAIN = "CrossAttnDownBlock3D", "DownBlock3D"
UP_CROSS, UP_PLAIN = "CrossAttnUpBlock3D", "UpBlock3D"
TINY = dict(
    block_out_channels=(8, 16), layers_per_block=1, cross_attention_dim=12, attention_head_dim=4, norm_num_groups=4,
    down_block_types=(CROSS, PLAIN), up_block_types=(UP_PLAIN, UP_CROSS), sample_size=8,
)  # fmt: skip
# Options of diffusers' class; frames, height and width of the latents.
CASES = {
    "as published": (TINY, (3, 8, 6)),
    "heads that do not divide, odd sizes": (
        TINY | dict(
            block_out_channels=(8, 12), attention_head_dim=5, layers_per_block=1, act_fn="Mish", norm_eps=0.1,
            down_block_types=(PLAIN, CROSS), up_block_types=(UP_CROSS, UP_PLAIN), in_channels=3, out_channels=6,
            mid_block_scale_factor=1.5, time_cond_proj_dim=5, downsample_padding=0, sample_size=(4, 6),
        ),
        (2, 5, 3),
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_output_gradients_and_folders_both_ways(case, randomise, assert_close, tmp_path):
    options, size = CASES[case]
    reference = randomise(UNet3DConditionModel(**options))
    module, params = check(reference, size, tmp_path, assert_close, masked=False)
    if case == "as published":
        call = inputs(module.config, (1, 3, 7))
        with torch.no_grad():
            wanted = theirs(reference, **call)
        assert_close(jax.jit(module.apply)({"params": params}, **call), wanted, 1e-4, "one frame")


def test_several_layers_and_one_block():
    """Checks names and shapes alone of what the cases above do not have."""
    with torch.device("meta"):
        reference = UNet3DConditionModel(
            block_out_channels=(8, 12, 16), layers_per_block=3, norm_num_groups=4, attention_head_dim=3,
            down_block_types=(CROSS, PLAIN, CROSS), up_block_types=(UP_PLAIN, UP_CROSS, UP_CROSS), act_fn="gelu",
        )  # fmt: skip
        one = UNet3DConditionModel(
            block_out_channels=(64,), down_block_types=(PLAIN,), up_block_types=(UP_PLAIN,), layers_per_block=1
        )
    for model in (reference, one):
        check_full_size(model, from_hf_config, sum(parameter.numel() for parameter in model.parameters()))


def test_full_size_parameters():
    """Checks names and shapes of Zeroscope's against diffusers' class, whose defaults are its sizes."""
    with torch.device("meta"):
        reference = UNet3DConditionModel(sample_size=32)
    count = sum(parameter.numel() for parameter in reference.parameters())
    assert check_full_size(reference, from_hf_config, count) == VideoUNetConfig()
    assert count == 1_411_233_860


HUB = {name: list(value) if isinstance(value, tuple) else value for name, value in TINY.items()}


def test_a_mesh_computes_the_same():
    """Checks it with layers that are recomputed in the backward pass, against one device."""
    single = dict(block_out_channels=[8], down_block_types=[CROSS], up_block_types=[UP_CROSS])
    config = from_hf_config(HUB | single)
    module = config.make()
    boxed = jax.eval_shape(module.init, jax.random.key(0), *sample(config))["params"]
    assert not [leaf for leaf in jax.tree.leaves(boxed, is_leaf=_is_boxed) if not _is_boxed(leaf)]
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda x: rng.normal(size=x.shape, scale=0.3).astype(np.float32), nn.meta.unbox(boxed))
    call = inputs(config, (2, 4, 6))
    wanted = jax.jit(module.apply)({"params": params}, **call)
    mesh = make_mesh(MeshConfig(data=1, fsdp=2, tensor=2), jax.devices()[:4])
    placed = jax.device_put(params, param_shardings(boxed, mesh))
    split = [path for path, leaf in jax.tree.leaves_with_path(placed) if not leaf.sharding.is_fully_replicated]
    assert len(split) > 40 and "temporal_convolutions_0" in str(split) and "temporal_transformer_0" in str(split)
    with use_mesh(mesh):
        found = jax.jit(with_compute(config, remat="full").make().apply)({"params": placed}, **call)
    np.testing.assert_allclose(found, wanted, rtol=0, atol=2e-5 * np.abs(wanted).max())


def _is_boxed(leaf) -> bool:
    return isinstance(leaf, nn.LogicallyPartitioned)


def test_a_fresh_model_is_one_of_images():
    """Checks that the convolutions over time begin as the identity."""
    layer, x = TemporalConvolutions(Style(norm_groups=2, frames=3)), np.random.default_rng(0).normal(size=(6, 2, 2, 4))
    fresh, params = layer.init_with_output(jax.random.key(0), x.astype(np.float32))
    np.testing.assert_array_equal(fresh, x.astype(np.float32))
    assert nn.meta.unbox(params)["params"]["conv_3"]["kernel"].all()


@pytest.mark.parametrize(
    "name,value",
    [
        ("num_attention_heads", 4),
        ("attention_head_dim", [4, 4]),
        ("attention_head_dim", 17),
        ("attention_head_dim", None),
        ("cross_attention_dim", [12, 12]),
        ("cross_attention_dim", None),
        ("layers_per_block", [1, 1]),
        ("norm_num_groups", None),
        ("norm_num_groups", 3),
        ("act_fn", "tanh"),
        ("down_block_types", ["CrossAttnDownBlockSpatioTemporal", PLAIN]),
        ("down_block_types", [CROSS]),
        ("up_block_types", [UP_PLAIN, "CrossAttnUpBlock2D"]),
        ("sample_size", [8, 8, 8]),
        ("use_linear_projection", True),
        ("resnet_time_scale_shift", "default"),
    ],
)
def test_unsupported_options_are_refused_by_name(name, value):
    with pytest.raises(ConfigError, match=name.removesuffix("_types")):
        from_hf_config(HUB | {name: value})


@pytest.mark.parametrize(
    "name,shape",
    [
        ("latents", (2, 8, 12, 4)),
        ("latents", (2, 4, 3, 8, 12)),
        ("latents", (2, 0, 8, 12, 4)),
        ("timesteps", (6,)),
        ("text", (2, 5, 11)),
        ("text", (6, 5, 12)),
        ("timestep_cond", (2, 4)),
    ],
)
def test_wrong_shapes_are_named(name, shape):
    config = from_hf_config(HUB)
    call = inputs(config, (3, 8, 12)) | {name: np.ones(shape, np.float32)}
    with pytest.raises(ConfigError, match=name):
        jax.eval_shape(config.make().init, jax.random.key(0), **call)
