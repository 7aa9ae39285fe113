"""ViT against ViTModel, and the convolutional stem against torch."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from einops import rearrange
from vision_checks import check_transformers, family_of, make_image, read, to_torch

from mllm_jax.encoders import vit_hf
from mllm_jax.encoders.vit import PatchEmbedding, ViTConfig, ViTDialect
from mllm_jax.errors import ConfigError

FAMILY = family_of(vit_hf, "ViTModel")
SIZES = dict(
    hidden_size=24, num_hidden_layers=3, num_attention_heads=3, intermediate_size=40, image_size=20, patch_size=5
)
CASES = {
    "plain": {},
    "no biases": dict(qkv_bias=False, hidden_act="gelu_new", num_channels=1, layer_norm_eps=0.1, pooler_act="linear"),
    "wide pooler": dict(pooler_output_size=17, pooler_act="relu", num_attention_heads=4, image_size=23),
}


@pytest.mark.parametrize("case", CASES)
def test_outputs_and_folders(case, randomise, assert_close, tmp_path):
    config = transformers.ViTConfig(**SIZES | CASES[case], attn_implementation="eager")
    reference = randomise(transformers.ViTModel(config))
    # 23 x 34 pixels fill 4 x 6 patches of 5; 15 x 10 are fewer patches than there are positions.
    check_transformers(
        reference, FAMILY, tmp_path, assert_close, [(20, 20), (23, 34), (15, 10)], interpolate_pos_encoding=True
    )


def test_without_a_pooler_the_config_says_so(randomise, assert_close, tmp_path):
    config = transformers.ViTConfig(**SIZES, add_pooling_layer=False)
    reference = randomise(transformers.ViTModel(config, add_pooling_layer=False))
    reference.save_pretrained(tmp_path)
    module, params = read(FAMILY, tmp_path)
    assert module.config.dialect.head_size is None
    with torch.no_grad():
        theirs = reference(to_torch(make_image(20, 20))).last_hidden_state
    ours = module.apply({"params": params}, make_image(20, 20))
    assert_close(ours.last_hidden_state, theirs, 1e-4)
    assert_close(ours.pooler_output, theirs[:, 0], 1e-4, "the class token")


@pytest.mark.parametrize(
    "values,named",
    [
        (dict(image_size=[20, 30]), "image_size"),
        (dict(hidden_act="swish2"), "hidden_act"),
        (dict(pooler_act="mish"), "pooler_act"),
        (dict(window=3), "window=3"),
        (dict(architectures=["ViTForImageClassification"]), "ViTForImageClassification"),
    ],
)
def test_options_that_cannot_be_honoured_are_refused_by_name(values, named):
    with pytest.raises(ConfigError, match=named):
        FAMILY.from_hf(dict(architectures=["ViTModel"]) | values)


def test_a_vit_that_the_family_has_no_options_for_is_not_written():
    with pytest.raises(ConfigError, match="class_token=False.*layer_scale=0.1"):
        FAMILY.to_hf(ViTConfig(dialect=ViTDialect(layer_scale=0.1)))


def test_convolutional_stem(assert_close):
    torch.manual_seed(0)
    stem = torch.nn.Sequential(
        torch.nn.Conv2d(3, 4, 3, 2, 1), torch.nn.ReLU(), torch.nn.Conv2d(4, 6, 3, 2, 1), torch.nn.ReLU()
    )
    projection = torch.nn.Conv2d(6, 10, 2, 2)
    c = ViTConfig(image_size=16, patch_size=8, hidden_size=10, num_heads=2, stem_channels=(4, 6))
    params = {
        "stem_0_kernel": rearrange(stem[0].weight.detach().numpy(), "o i h w -> h w i o"),
        "stem_0_bias": stem[0].bias.detach().numpy(),
        "stem_1_kernel": rearrange(stem[2].weight.detach().numpy(), "o i h w -> h w i o"),
        "stem_1_bias": stem[2].bias.detach().numpy(),
        "projection": {
            "kernel": rearrange(projection.weight.detach().numpy(), "e c p q -> (p q c) e"),
            "bias": projection.bias.detach().numpy(),
        },
    }
    pixels = np.random.default_rng(1).normal(size=(2, 16, 16, 3)).astype(np.float32)
    with torch.no_grad():
        theirs = projection(stem(torch.tensor(rearrange(pixels, "b h w c -> b c h w"))))
    ours = PatchEmbedding(c).apply({"params": params}, jnp.asarray(pixels))
    assert_close(ours, rearrange(theirs.numpy(), "b e h w -> b (h w) e"), 1e-4, "patches")
