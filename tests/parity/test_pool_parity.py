"""Average pooling and its MLP against transformers' LLaVA-NeXT-Video and torch's own pooling; refusals."""

from __future__ import annotations

import jax
import numpy as np
import pytest
import torch
from einops import rearrange
from flax import linen as nn
from transformers import LlavaNextVideoConfig
from transformers.models.llava_next_video import modeling_llava_next_video as reference_code

from mllm_jax.encoders.vit import ViTConfig
from mllm_jax.errors import ConfigError
from mllm_jax.llms.decoder import DecoderConfig
from mllm_jax.models.branch import Branch
from mllm_jax.models.multimodal import MultimodalConfig
from mllm_jax.projectors.pool import PoolProjectorConfig

SIDE, WIDTH = 12, 16


def params_of(layers: dict[str, torch.nn.Linear]) -> dict:
    stored = {
        name: {"kernel": layer.weight.detach().numpy().T, "bias": layer.bias.detach().numpy()}
        for name, layer in layers.items()
    }
    return {"mlp": stored}


def project(c: PoolProjectorConfig, params: dict, features: np.ndarray, assert_same_tree) -> np.ndarray:
    assert_same_tree(params, nn.meta.unbox(jax.eval_shape(c.make().init, jax.random.key(0), features)["params"]))
    ours = c.make().apply({"params": params}, features)
    assert ours.shape == (len(features), c.num_tokens(SIDE), c.output_size)
    return ours


@pytest.fixture(scope="module")
def features():
    return np.random.default_rng(0).normal(size=(2, SIDE * SIDE, WIDTH)).astype(np.float32)


@pytest.mark.parametrize("factor", [1, 2, 3])
def test_llava_next_video(factor, features, randomise, assert_close, assert_same_tree):
    config = LlavaNextVideoConfig(
        vision_config=dict(
            model_type="clip_vision_model", hidden_size=WIDTH, num_attention_heads=2, image_size=4 * SIDE, patch_size=4
        ),
        text_config=dict(model_type="llama", hidden_size=20, num_attention_heads=2),
        spatial_pool_mode="average",
        spatial_pool_stride=factor,
    )
    pooler = reference_code.LlavaNextVideoPooler(config)
    projector = randomise(reference_code.LlavaNextVideoMultiModalProjector(config))
    with torch.no_grad():
        theirs = projector(pooler(torch.tensor(features))).numpy()
    params = params_of({"linear_1": projector.linear_1, "linear_2": projector.linear_2})
    assert_close(project(PoolProjectorConfig(20, factor), params, features, assert_same_tree), theirs, 1e-5, "pooled")


@pytest.mark.parametrize("factor", [2, 6])
def test_torch(factor, features, randomise, assert_close, assert_same_tree):
    linear = randomise(torch.nn.Linear(WIDTH, 10))
    grid = torch.tensor(rearrange(features, "b (h w) e -> b e h w", h=SIDE))
    with torch.no_grad():
        pooled = torch.nn.functional.avg_pool2d(grid, factor)
        theirs = linear(rearrange(pooled, "b e h w -> b (h w) e")).numpy()
    c = PoolProjectorConfig(10, factor, num_layers=1)
    assert_close(project(c, params_of({"linear_1": linear}), features, assert_same_tree), theirs, 1e-5, "pooled")


def test_what_does_not_fit_is_refused():
    for wrong, message in [(dict(factor=0), "factor 0"), (dict(num_layers=0), "MLP"), (dict(activation="sine"), "MLP")]:
        with pytest.raises(ConfigError, match=message):
            PoolProjectorConfig(10, **wrong)
    for vectors, message in [(5, "5 vectors"), (9, "3 x 3")]:
        with pytest.raises(ConfigError, match=message):
            jax.eval_shape(PoolProjectorConfig(10).make().init, jax.random.key(0), np.zeros((1, vectors, 4)))
    composed = MultimodalConfig(
        {"image": Branch(ViTConfig(24, 4, 12, num_layers=1, num_heads=2, mlp_size=16), PoolProjectorConfig(16, 3))},
        DecoderConfig(vocab_size=29, hidden_size=16, num_layers=1, num_heads=4, mlp_size=24),
    )
    assert composed.media_tokens == 4
    with pytest.raises(ConfigError, match="4 x 4 patches on a grid of 6 x 6"):
        composed.with_branch("image", projector=PoolProjectorConfig(16, 4))
