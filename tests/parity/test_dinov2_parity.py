"""DINOv2 against Dinov2Model."""

from __future__ import annotations

import dataclasses

import pytest
import transformers
from safetensors.torch import load_file
from vision_checks import check_transformers, family_of

from mllm_jax.encoders import dinov2
from mllm_jax.errors import ConfigError

FAMILY = family_of(dinov2, "Dinov2Model")
SIZES = dict(hidden_size=24, num_hidden_layers=3, num_attention_heads=3, image_size=30, patch_size=5)
CASES = {
    "small": {},
    "giant": dict(use_swiglu_ffn=True, mlp_ratio=3, layer_norm_eps=0.1),
    "no biases": dict(qkv_bias=False, hidden_act="relu", mlp_ratio=2, use_mask_token=False, layerscale_value=0.5),
}


@pytest.mark.parametrize("case", CASES)
def test_outputs_and_folders(case, randomise, assert_close, tmp_path):
    config = transformers.Dinov2Config(**SIZES | CASES[case], attn_implementation="eager")
    reference = randomise(transformers.Dinov2Model(config))
    sizes = [(30, 30), (20, 38), (10, 15)]
    check_transformers(reference, FAMILY, tmp_path, assert_close, sizes, ignored=("embeddings.mask_token",))
    if case == "giant":
        assert "encoder.layer.0.mlp.weights_in.weight" in load_file(tmp_path / "ours" / "model.safetensors")


def test_a_width_that_no_ratio_gives_is_not_written():
    config = FAMILY.from_hf(dict(architectures=["Dinov2Model"]) | SIZES)
    with pytest.raises(ConfigError, match="MLP of 97"):
        FAMILY.to_hf(dataclasses.replace(config, mlp_size=97))
