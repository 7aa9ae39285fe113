"""AudioLDM-2's UNet against diffusers' AudioLDM2UNet2DConditionModel, through real folders both ways."""

from __future__ import annotations

import jax
import numpy as np
import pytest
import torch
from diffusers import AudioLDM2UNet2DConditionModel
from unet_checks import check, check_full_size, inputs

from mllm_jax.errors import ConfigError
from mllm_jax.generators.unet_audio import AudioUNetConfig, from_hf_config

CROSS, PLAIN = "CrossAttnDownBlock2D", "DownBlock2D"
UP_CROSS, UP_PLAIN = "CrossAttnUpBlock2D", "UpBlock2D"
TINY = dict(
    block_out_channels=(8, 16), layers_per_block=1, cross_attention_dim=[[None, 12, 10]] * 2, attention_head_dim=4,
    norm_num_groups=4, down_block_types=(PLAIN, CROSS), up_block_types=(UP_CROSS, UP_PLAIN), in_channels=3,
)  # fmt: skip
CASES = {
    "as published": (TINY, (12, 4), True),
    "several texts a block": (
        TINY | dict(
            cross_attention_dim=[[12, None, 10], [None, None]], use_linear_projection=True, layers_per_block=(2, 1),
            down_block_types=(CROSS, PLAIN), up_block_types=(UP_PLAIN, UP_CROSS), only_cross_attention=(True, False),
            transformer_layers_per_block=[1, 0], resnet_time_scale_shift="scale_shift", attention_head_dim=(2, 4),
        ),
        (9, 5), False,
    ),
    "one text": (TINY | dict(cross_attention_dim=12, class_embed_type="timestep"), (8, 3), True),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_output_gradients_and_folders_both_ways(case, randomise, assert_close, tmp_path):
    options, size, masked = CASES[case]
    check(randomise(AudioLDM2UNet2DConditionModel(**options)), size, tmp_path, assert_close, masked)


def test_full_size_parameters():
    with torch.device("meta"):
        reference = AudioLDM2UNet2DConditionModel(
            in_channels=8, out_channels=8, block_out_channels=(128, 256, 384, 640),
            cross_attention_dim=[[None, 768, 1024]] * 4, down_block_types=(PLAIN, CROSS, CROSS, CROSS),
            up_block_types=(UP_CROSS, UP_CROSS, UP_CROSS, UP_PLAIN),
        )  # fmt: skip
    count = sum(parameter.numel() for parameter in reference.parameters())
    assert count > 2e8
    assert check_full_size(reference, from_hf_config, count) == AudioUNetConfig()


@pytest.mark.parametrize(
    "name,value",
    [
        ("cross_attention_dim", [[None, 12, 10, 10, 10]] * 2),
        ("cross_attention_dim", [[12, 16], 12]),
        ("transformer_layers_per_block", [[1], 1]),
        ("mid_block_type", None),
        ("dual_cross_attention", False),
        ("center_input_sample", True),
    ],
)
def test_unsupported_options_are_refused_by_name(name, value):
    with pytest.raises(ConfigError, match=name.replace("_type", "")):
        from_hf_config(TINY | dict(down_block_types=(CROSS, CROSS)) | {name: value})


def test_a_wrong_second_text_is_named():
    config = from_hf_config({name: list(v) if isinstance(v, tuple) else v for name, v in TINY.items()})
    call = inputs(config, (4, 4))
    with pytest.raises(ConfigError, match="text_1"):
        jax.eval_shape(config.make().init, jax.random.key(0), **call | dict(text_1=np.ones((2, 3, 12))))
