"""The first Qwen-VL's configs: what is read, written and refused."""

from __future__ import annotations

from dataclasses import replace

import jax
import pytest

from mllm_jax.errors import ConfigError
from mllm_jax.models.qwen_vl_v1 import TOWER, QwenVLTowerConfig, read_tower, write_tower
from mllm_jax.models.registry import abstract_params, family_of_config

VISUAL = dict(
    heads=16, image_size=448, image_start_id=151857, layers=48, mlp_ratio=4.9231, output_dim=4096, patch_size=14
)
VISUAL |= dict(width=1664)


def count(config) -> int:
    return sum(leaf.size for leaf in jax.tree.leaves(abstract_params(config, family_of_config(config))))


def test_the_towers_config():
    config = read_tower(dict(architectures=["QWenLMHeadModel"], visual=VISUAL, vocab_size=9))
    assert config == QwenVLTowerConfig() and config.encoder.mlp_size == 8192 and config.family == TOWER
    assert config.projector.num_tokens(config.encoder.grid) == 256
    assert read_tower(write_tower(config)) == config
    with pytest.raises(ConfigError, match="head_dim=16"):
        write_tower(replace(config, projector=replace(config.projector, head_dim=16)))
    with pytest.raises(ConfigError, match="ls_init_value"):
        read_tower(dict(visual=VISUAL | dict(ls_init_value=0.1)))
    assert config.with_dtype("bfloat16").projector.dtype == config.with_dtype("bfloat16").dtype == "bfloat16"


def test_the_towers_size():
    """1,842,770,688 are the ViT's (1.9 billion in the paper), 76,054,528 the resampler's (0.08 billion), the rest is
    the last norm and map."""
    assert count(QwenVLTowerConfig()) == 1_935_610_624
