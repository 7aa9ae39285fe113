"""InternVL's projector against transformers' class, and both versions against stored outputs of OpenGVLab's code."""

from __future__ import annotations

import jax
import numpy as np
import pytest
import torch
from einops import rearrange
from flax import linen as nn
from transformers import InternVLConfig
from transformers.models.internvl.modeling_internvl import InternVLModel, InternVLMultiModalProjector
from vision_checks import GOLDENS

from mllm_jax.projectors.pixel_shuffle import PixelShuffleProjectorConfig, pixel_shuffle


def params_of(tensors: dict[str, np.ndarray], norm: str, first: str, second: str) -> dict:
    linear = {ours: name for ours, name in (("linear_1", first), ("linear_2", second))}
    return {"norm": {"scale": tensors[f"{norm}.weight"], "bias": tensors[f"{norm}.bias"]}} | {
        ours: {"kernel": tensors[f"{name}.weight"].T, "bias": tensors[f"{name}.bias"]} for ours, name in linear.items()
    }


@pytest.mark.parametrize(("factor", "activation"), [(2, "gelu"), (1, "gelu"), (4, "relu")])
def test_transformers(factor, activation, randomise, to_numpy, assert_close, assert_same_tree):
    config = InternVLConfig(
        vision_config=dict(model_type="internvl_vision", hidden_size=12, num_attention_heads=2),
        text_config=dict(model_type="qwen2", hidden_size=20),
        downsample_ratio=1 / factor,
        projector_hidden_act=activation,
    )
    reference = randomise(InternVLMultiModalProjector(config))
    params = params_of(to_numpy(reference.state_dict()), "layer_norm", "linear_1", "linear_2")
    c = PixelShuffleProjectorConfig(output_size=20, factor=factor, activation=activation)
    features = np.random.default_rng(0).normal(size=(2, 64, 12)).astype(np.float32)
    assert_same_tree(params, nn.meta.unbox(jax.eval_shape(c.make().init, jax.random.key(0), features)["params"]))

    # The method uses nothing of its instance, so none is built.
    grid = rearrange(torch.tensor(features), "b (h w) e -> b h w e", h=8)
    with torch.no_grad():
        theirs = reference(InternVLModel.pixel_shuffle(None, grid, scale_factor=1 / factor).flatten(1, 2)).numpy()
    ours = c.make().apply({"params": params}, features)
    assert ours.shape[1] == c.num_tokens(8)
    assert_close(ours, theirs, 1e-5, "projected")


@pytest.mark.parametrize("version", ["v1", "v2"])
@pytest.mark.parametrize("name", ["internvit_300m_style", "internvit_6b_style"])
def test_the_original_code(name, version, assert_close):
    golden = np.load(GOLDENS / f"{name}.npz")
    probe = pixel_shuffle(golden["inputs/shuffle_probe"], 2, version)
    np.testing.assert_array_equal(probe, golden[f"outputs/pixel_shuffle_{version}_nonsquare"])

    tensors = {key.removeprefix("weights/"): golden[key] for key in golden.files if key.startswith("weights/mlp1")}
    params = params_of(tensors, "mlp1.0", "mlp1.1", "mlp1.3")
    features = golden["outputs/vit/last_hidden_state"][:, 1:]
    module = PixelShuffleProjectorConfig(output_size=params["linear_2"]["bias"].size, version=version).make()
    ours = module.apply({"params": params}, features)
    assert_close(ours, golden[f"outputs/extract_feature_{version}"], 1e-5, version)
    other = golden[f"outputs/extract_feature_{'v1' if version == 'v2' else 'v2'}"]
    assert np.abs(ours - other).max() > 0.1, "the versions differ in the order of tokens"
