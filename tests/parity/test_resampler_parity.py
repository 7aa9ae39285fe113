"""The resampler against the Perceiver resamplers of Idefics and Idefics2."""

from __future__ import annotations

from types import SimpleNamespace

import jax
import numpy as np
import pytest
import torch
from safetensors.numpy import save_file
from transformers.models.idefics.perceiver import IdeficsPerceiverResampler
from transformers.models.idefics2.configuration_idefics2 import Idefics2PerceiverConfig
from transformers.models.idefics2.modeling_idefics2 import Idefics2PerceiverResampler

from mllm_jax.checkpoints.fields import make_config
from mllm_jax.checkpoints.hf import read_weights
from mllm_jax.checkpoints.table import Table, Weight
from mllm_jax.models.registry import abstract_init
from mllm_jax.projectors.resampler import ResamplerConfig

WIDTH, HEADS, HEAD_DIM, QUERIES, LAYERS = 20, 3, 6, 5, 2
COMMON = dict(
    output_size=WIDTH,
    num_queries=QUERIES,
    num_layers=LAYERS,
    num_heads=HEADS,
    head_dim=HEAD_DIM,
    positions="none",
    attends_itself=True,
    residual=True,
    bias=False,
    output_map=False,
)


def loaded(config: ResamplerConfig, reference: torch.nn.Module, names: dict[str, str], norms: dict[str, str], folder):
    """Reads the reference's weights through a table and the engine that reads folders.

    Args:
        names, norms: our linear maps and norms -> the reference's.
    """
    weights = [Weight("latents", "query")]
    patterns = dict.fromkeys("qkv", "(n h) e -> e n h") | {"out": "e (n h) -> n h e"}
    for ours, theirs in names.items():
        pattern = patterns.get(ours, "o i -> i o")
        weights.append(
            Weight(f"{theirs}.weight", f"layers/{ours}/kernel", pattern, {"h": HEAD_DIM} if "h" in pattern else {})
        )
    for ours, theirs in norms.items():
        weights.append(Weight(f"{theirs}.weight", f"{ours}/scale"))
        if config.dialect.norm == "layer":
            weights.append(Weight(f"{theirs}.bias", f"{ours}/bias"))
    save_file({n: t.detach().numpy().copy() for n, t in reference.state_dict().items()}, folder / "model.safetensors")
    return read_weights(
        folder, Table(tuple(weights)), abstract_init(config.make(), np.zeros((1, 4, WIDTH), np.float32))
    )


@pytest.mark.parametrize("qk_norm", [False, True])
def test_idefics(qk_norm, randomise, assert_close, tmp_path):
    sizes = SimpleNamespace(
        perceiver_config=SimpleNamespace(qk_layer_norms_perceiver=qk_norm),
        vision_config=SimpleNamespace(embed_dim=WIDTH),
    )
    reference = randomise(IdeficsPerceiverResampler(sizes, WIDTH, LAYERS, HEADS, HEAD_DIM, QUERIES))
    config = make_config(
        ResamplerConfig, **COMMON, mlp_size=4 * WIDTH, activation="relu", qk_norm=qk_norm, norm_eps=1e-5
    )
    attention, mlp = "blocks.{layer}.0", "blocks.{layer}.1"
    names = {letter: f"{attention}.{letter}_proj" for letter in "qkv"} | {"out": f"{attention}.output_proj"}
    norms = {
        "layers/query_norm": f"{attention}.latents_layer_norm",
        "layers/kv_norm": f"{attention}.context_layer_norm",
        "layers/mlp_norm": f"{mlp}.ln",
        "output_norm": "layer_norm",
    }
    if qk_norm:
        norms |= {f"layers/{letter}_norm": f"{attention}.{letter}_layer_norm" for letter in "qk"}
    names |= {"mlp/up": f"{mlp}.fc", "mlp/down": f"{mlp}.c_proj"}
    params = loaded(config, reference, names, norms, tmp_path)
    features = np.random.default_rng(0).normal(size=(2, 7, WIDTH)).astype(np.float32)
    with torch.no_grad():
        theirs = reference(torch.tensor(features))
    assert_close(jax.jit(config.make().apply)({"params": params}, features), theirs, 1e-5, "media tokens")


def test_idefics2(randomise, assert_close, tmp_path):
    hub = Idefics2PerceiverConfig(
        hidden_size=WIDTH,
        hidden_act="silu",
        resampler_n_latents=QUERIES,
        resampler_depth=LAYERS,
        resampler_n_heads=4,
        resampler_head_dim=HEAD_DIM,
        num_key_value_heads=2,
        rms_norm_eps=0.01,
    )
    hub._attn_implementation = "eager"
    reference = randomise(Idefics2PerceiverResampler(hub))
    sizes = COMMON | dict(num_heads=4, num_kv_heads=2)
    config = make_config(
        ResamplerConfig,
        **sizes,
        mlp_size=4 * WIDTH,
        activation="silu",
        gated=True,
        norm="rms",
        norm_eps=hub.rms_norm_eps,
    )
    layer = "layers.{layer}"
    names = {ours: f"{layer}.self_attn.{ours[0]}_proj" for ours in ("q", "k", "v", "out")}
    names |= {f"mlp/{name}": f"{layer}.mlp.{name}_proj" for name in ("gate", "up", "down")}
    norms = {
        "layers/query_norm": f"{layer}.input_latents_norm",
        "layers/kv_norm": f"{layer}.input_context_norm",
        "layers/mlp_norm": f"{layer}.post_attention_layernorm",
        "output_norm": "norm",
    }
    params = loaded(config, reference, names, norms, tmp_path)
    features = np.random.default_rng(0).normal(size=(2, 7, WIDTH)).astype(np.float32)
    with torch.no_grad():
        theirs = reference(context=torch.tensor(features), attention_mask=torch.ones(2, 7))
    assert_close(jax.jit(config.make().apply)({"params": params}, features), theirs, 1e-5, "media tokens")
