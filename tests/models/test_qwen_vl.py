"""Qwen's VL models at their real sizes, and positions in three parts."""

from __future__ import annotations

import math
import runpy
from pathlib import Path

import jax
import numpy as np
import pytest
import torch
import transformers
from flax import linen as nn

from mllm_jax.data.processing.media import PreparedMedia, Row
from mllm_jax.models import qwen_vl
from mllm_jax.models.qwen_vl import mrope_positions
from mllm_jax.models.registry import abstract_params, family_of_config

ROPE = dict(rope_type="default", rope_theta=1e6, mrope_section=[16, 24, 24])
ROPE3 = dict(rope_type="default", rope_theta=5e6, mrope_section=[24, 20, 20], mrope_interleaved=True)


def text(width, layers, heads, kv, mlp, vocab=151936, **more):
    sizes = dict(hidden_size=width, num_hidden_layers=layers, num_attention_heads=heads, num_key_value_heads=kv)
    return dict(rope_parameters=ROPE) | sizes | dict(intermediate_size=mlp, vocab_size=vocab) | more


# Sizes in the config.json of Qwen's repositories: the class, LLM, image encoder, whether the head is tied.
TOWER3 = dict(hidden_size=1152, depth=27, num_heads=16, intermediate_size=4304, out_hidden_size=4096)
SIZES = {
    "Qwen2-VL-2B": ("Qwen2VL", text(1536, 28, 12, 2, 8960), dict(hidden_size=1536), True),
    "Qwen2-VL-7B": ("Qwen2VL", text(3584, 28, 28, 4, 18944, 152064), dict(hidden_size=3584), False),
    "Qwen2.5-VL-3B": (
        "Qwen2_5_VL",
        text(2048, 36, 16, 2, 11008),
        dict(hidden_size=1280, out_hidden_size=2048, intermediate_size=3420),
        True,
    ),
    "Qwen2.5-VL-7B": (
        "Qwen2_5_VL",
        text(3584, 28, 28, 4, 18944, 152064),
        dict(hidden_size=1280, out_hidden_size=3584, intermediate_size=3420),
        False,
    ),
    "Qwen3-VL-8B": ("Qwen3VL", text(4096, 36, 32, 8, 12288, rope_parameters=ROPE3, head_dim=128), TOWER3, False),
}


def count(config) -> int:
    params = nn.meta.unbox(abstract_params(config, family_of_config(config)))
    return sum(math.prod(x.shape) for x in jax.tree.leaves(params))


@pytest.mark.parametrize("name", SIZES)
def test_sizes_are_the_references(name):
    kind, llm, tower, tied = SIZES[name]
    config = getattr(transformers, f"{kind}Config")(text_config=llm, vision_config=tower, tie_word_embeddings=tied)
    with torch.device("meta"):
        reference = getattr(transformers, f"{kind}ForConditionalGeneration")(config)
    reference.tie_weights()
    named = config.to_dict() | dict(architectures=[f"{kind}ForConditionalGeneration"])
    ours = qwen_vl.from_hf_config(named)
    assert count(ours) == sum(p.numel() for p in reference.parameters())
    if name == "Qwen2.5-VL-7B":
        path = Path(__file__).parents[2] / "configs" / "qwen25vl_7b.py"
        assert count(runpy.run_path(str(path))["model"]()) == count(ours) == 8_292_166_656  # as the hub counts


def test_old_flat_folders_say_the_same():
    kind, llm, tower, tied = SIZES["Qwen2.5-VL-7B"]
    nested = dict(
        architectures=[qwen_vl.QWEN25], model_type="qwen2_5_vl", text_config=llm, vision_config=tower,
        tie_word_embeddings=tied, image_token_id=7,
    )  # fmt: skip
    own = {name: value for name, value in llm.items() if name != "rope_parameters"}
    flat = {name: value for name, value in nested.items() if name != "text_config"} | own
    flat |= dict(rope_theta=1e6, rope_scaling=dict(type="mrope", mrope_section=[16, 24, 24]))
    assert qwen_vl.from_hf_config(flat) == qwen_vl.from_hf_config(nested)


def test_text_goes_on_by_the_longer_side_and_time_by_the_second():
    def media(grid, seconds=None):
        size = math.prod(grid) // 4
        return PreparedMedia({}, np.zeros(size), np.arange(size), grid=grid, seconds=seconds)

    shown = [media((1, 4, 6)), media((3, 2, 2), seconds=1.0)]
    owners = np.array([-1, -1, *[0] * 6, -1, *[1] * 3, -1])
    places = np.where(owners < 0, -1, 0)[:, None]
    row = Row(np.zeros(13), places, np.ones((13, 1)), owners)
    found = mrope_positions(row, shown, 2, 2)
    image = [[2, 2 + h, 2 + w] for h in range(2) for w in range(3)]
    video = [[6, 6, 6], [8, 6, 6], [10, 6, 6]]
    assert found.tolist() == [[0] * 3, [1] * 3, *image, [5] * 3, *video, [7] * 3]
    assert mrope_positions(row, shown, 2, None)[9:12, 0].tolist() == [6, 7, 8]
