"""The ViT against ViTModel, and its convolutional stem against torch."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from einops import rearrange
from flax import linen as nn

from mllm_jax.encoders.vit import PatchEmbedding, ViTConfig


def our_params(weights: dict[str, np.ndarray], c: ViTConfig) -> dict:
    """Hugging Face names to the encoder's tree."""

    def stack(name: str, pattern: str) -> np.ndarray:
        layers = [weights[f"layers.{i}.{name}"] for i in range(c.num_layers)]
        return np.stack([rearrange(w, pattern, **({"n": c.num_heads} if "n" in pattern else {})) for w in layers])

    def norm(name: str) -> dict:
        return {"scale": stack(f"{name}.weight", "e -> e"), "bias": stack(f"{name}.bias", "e -> e")}

    attention = {
        part: {
            "kernel": stack(f"attention.{part}_proj.weight", "(n h) e -> e n h"),
            "bias": stack(f"attention.{part}_proj.bias", "(n h) -> n h"),
        }
        for part in "qkv"
    }
    attention["out"] = {
        "kernel": stack("attention.o_proj.weight", "e (n h) -> n h e"),
        "bias": stack("attention.o_proj.bias", "e -> e"),
    }
    return {
        "patch_embedding": {
            "projection": {
                "kernel": rearrange(weights["embeddings.patch_embeddings.projection.weight"], "e c p q -> (p q c) e"),
                "bias": weights["embeddings.patch_embeddings.projection.bias"],
            }
        },
        "class_token": weights["embeddings.cls_token"][0],
        "position_embedding": weights["embeddings.position_embeddings"][0],
        "layers": {
            "attention": attention,
            "attention_norm": norm("layernorm_before"),
            "mlp_norm": norm("layernorm_after"),
            "mlp": {
                ours: {
                    "kernel": stack(f"mlp.{theirs}.weight", "o i -> i o"),
                    "bias": stack(f"mlp.{theirs}.bias", "o -> o"),
                }
                for ours, theirs in (("up", "fc1"), ("down", "fc2"))
            },
        },
        "final_norm": {"scale": weights["layernorm.weight"], "bias": weights["layernorm.bias"]},
    }


@pytest.mark.parametrize("eps", [1e-12, 0.1])
def test_hidden_states_and_class_token(eps, randomise, to_numpy, assert_close, assert_same_tree):
    config = transformers.ViTConfig(
        hidden_size=24,
        num_hidden_layers=3,
        num_attention_heads=3,
        intermediate_size=40,
        image_size=20,
        patch_size=5,
        layer_norm_eps=eps,
        attn_implementation="eager",
    )
    reference = randomise(transformers.ViTModel(config, add_pooling_layer=False))
    c = ViTConfig(20, 5, 24, 3, 3, 40, norm_eps=eps, class_token=True)
    params = our_params(to_numpy(reference.state_dict()), c)
    pixels = np.random.default_rng(0).normal(size=(2, 20, 20, 3)).astype(np.float32)
    assert_same_tree(params, nn.meta.unbox(jax.eval_shape(c.make().init, jax.random.key(0), pixels)["params"]))
    with torch.no_grad():
        theirs = reference(torch.tensor(rearrange(pixels, "b h w c -> b c h w"))).last_hidden_state.numpy()
    ours = jax.jit(c.make().apply)({"params": params}, pixels)
    assert_close(ours.last_hidden_state, theirs, 1e-4, "last_hidden_state")
    assert_close(ours.pooler_output, theirs[:, 0], 1e-4, "class token")


def test_convolutional_stem(assert_close):
    torch.manual_seed(0)
    stem = torch.nn.Sequential(
        torch.nn.Conv2d(3, 4, 3, 2, 1), torch.nn.ReLU(), torch.nn.Conv2d(4, 6, 3, 2, 1), torch.nn.ReLU()
    )
    projection = torch.nn.Conv2d(6, 10, 2, 2)
    c = ViTConfig(image_size=16, patch_size=8, hidden_size=10, stem_channels=(4, 6))
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
