"""InternViT against InternVLVisionModel and against stored outputs of OpenGVLab's own code."""

from __future__ import annotations

import json

import jax
import numpy as np
import pytest
import torch
import transformers
from einops import rearrange
from safetensors.numpy import save_file
from vision_checks import GOLDENS, check_transformers, family_of, read, write

from mllm_jax.checkpoints.fields import change_fields
from mllm_jax.encoders import internvit
from mllm_jax.errors import ConfigError

FAMILY = family_of(internvit, "InternVLVisionModel")
ORIGINAL = family_of(internvit, "InternVisionModel")
SIZES = dict(
    hidden_size=40, num_hidden_layers=3, num_attention_heads=5, intermediate_size=60, image_size=24, patch_size=4
)
CASES = {
    "300M": dict(attention_bias=True),
    "6B": dict(norm_type="rms_norm", use_qk_norm=True, layer_norm_eps=0.1),
    "class token": dict(use_mean_pooling=False, hidden_act="gelu_new", use_mask_token=True),
}


@pytest.mark.parametrize("case", CASES)
def test_outputs_and_folders(case, randomise, assert_close, tmp_path):
    config = transformers.InternVLVisionConfig(**SIZES | CASES[case], attn_implementation="eager")
    reference = randomise(transformers.InternVLVisionModel(config))
    sizes = [(24, 24), (16, 34), (8, 12)]
    check_transformers(reference, FAMILY, tmp_path, assert_close, sizes, ignored=("embeddings.mask_token",))


@pytest.mark.parametrize("name", ["internvit_300m_style", "internvit_6b_style"])
def test_the_original_code(name, assert_close, tmp_path):
    golden = np.load(GOLDENS / f"{name}.npz")
    prefix = "weights/vision_model."
    tensors = {file.removeprefix("weights/"): golden[file] for file in golden.files if file.startswith(prefix)}
    (tmp_path / "theirs").mkdir()
    save_file(tensors, tmp_path / "theirs" / "model.safetensors")
    options = json.loads((GOLDENS / f"{name}.json").read_text("utf-8"))["config"]["vision"]
    config = dict(architectures=["InternVisionModel"], model_type="intern_vit_6b", use_flash_attn=True) | options
    (tmp_path / "theirs" / "config.json").write_text(json.dumps(config), "utf-8")
    module, params = read(ORIGINAL, tmp_path / "theirs")

    def run(pixels):
        return jax.jit(module.apply, static_argnums=2)(
            {"params": params}, rearrange(pixels, "b c h w -> b h w c"), True
        )

    ours = run(golden["inputs/pixel_values"])
    for i, state in enumerate(ours.hidden_states):
        assert_close(state, golden[f"outputs/vit/hidden{i}"], 1e-4, f"hidden state {i}")
    assert_close(ours.last_hidden_state, golden["outputs/vit/last_hidden_state"], 1e-4, "last")
    assert_close(ours.pooler_output, golden["outputs/vit/pooler_output"], 1e-4, "pooled")
    ours = run(golden["inputs/pixel_values_other_resolution"])
    assert_close(ours.last_hidden_state, golden["outputs/vit/other_resolution_last_hidden"], 1e-4, "6 x 3 patches")

    write(ORIGINAL, module, params, tmp_path / "ours")
    _, again = read(ORIGINAL, tmp_path / "ours")
    assert jax.tree.all(jax.tree.map(lambda a, b: bool((a == b).all()), params, again))
    # The same encoder as transformers' class, which pools nothing.
    write(
        FAMILY,
        change_fields(module.config, family="InternVLVisionModel", pooler="none").make(),
        params,
        tmp_path / "hf",
    )
    opened = transformers.InternVLVisionModel.from_pretrained(tmp_path / "hf")
    theirs = opened(torch.tensor(golden["inputs/pixel_values"]))
    assert_close(
        theirs.last_hidden_state.detach(), golden["outputs/vit/last_hidden_state"], 1e-4, "written as InternVL's"
    )


def test_options_that_cannot_be_honoured_are_refused_by_name():
    for option in (dict(use_absolute_position_embeddings=False), dict(norm_type="batch_norm"), dict(rope=True)):
        with pytest.raises(ConfigError, match=next(iter(option))):
            FAMILY.from_hf(dict(architectures=["InternVLVisionModel"]) | option)
