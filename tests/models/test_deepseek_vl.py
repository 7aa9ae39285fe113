"""DeepSeek-VL's published size and stages."""

from __future__ import annotations

import math
import runpy
from fnmatch import fnmatchcase
from pathlib import Path

import jax
import pytest
import torch
import transformers
from flax import linen as nn

from mllm_jax.data.pipeline import Mixture, Weighted
from mllm_jax.models.deepseek_vl import from_hf_config, to_hf_config
from mllm_jax.models.registry import abstract_params, family_of_config

CONFIG = Path(__file__).parents[2] / "configs" / "deepseek_vl_7b.py"
# The parameters of SigLIP's head, which is stored and unused: a query, attention, norm and MLP.
HEAD = 1024 + 4 * (1024**2 + 1024) + 2 * 1024 + 2 * 1024 * 4096 + 4096 + 1024
STAGES = {  # table 4: steps, learning rate, warm-up, rows
    "warm_up": (15_000, 1e-3, 128, 256),
    "pretrain": (42_000, 4.2e-5, 2000, 2304),
    "instruct": (10_000, 2e-5, 256, 256),
}


@pytest.fixture(scope="module")
def published() -> dict:
    return runpy.run_path(str(CONFIG))


@pytest.fixture(scope="module")
def params(published):
    config = published["model"]()
    return nn.meta.unbox(abstract_params(config, family_of_config(config)))


def count(tree) -> int:
    return sum(math.prod(x.shape) for x in jax.tree.leaves(tree))


def test_the_full_size(published, params):
    """Checks the config, the reference class, and the authors' files: 14.69 GB of two-byte numbers."""
    config = published["model"]()
    assert {name: count(part) for name, part in params.items()} == dict(
        encoder_image=400_045_313, projector_image=20_979_712, llm=6_910_365_696
    )
    assert count(params) == 7_331_390_721 and config.media_tokens == 576
    assert round((count(params) + HEAD) * 2 / 1e9, 2) == round(4.98 + 4.96 + 4.75, 2)
    written = to_hf_config(config)
    assert from_hf_config(written).image.encoder.widths == config.image.encoder.widths == (1024, 1024)
    hf = transformers.AutoConfig.for_model(**{k: v for k, v in written.items() if k != "architectures"})
    with torch.device("meta"):
        reference = transformers.DeepseekVLHybridForConditionalGeneration(hf)
    assert sum(p.numel() for p in reference.parameters()) == count(params)


@pytest.mark.parametrize("name", STAGES)
def test_published_stages(published, params, name):
    steps, rate, warm_up, rows = STAGES[name]
    length = published["WARM_UP_LENGTH" if name == "warm_up" else "LENGTH"]
    stage = published[name](
        Mixture((Weighted(None),), rows=published[f"{name.upper()}_ROWS"], length=length, slots={"image": 1})
    )
    assert (stage.name, stage.steps, stage.data.rows) == (name, steps, rows)
    assert (stage.optimizer.learning_rate, stage.optimizer.warmup_steps, stage.optimizer.b2) == (rate, warm_up, 0.95)
    paths = ["/".join(key.key for key in path) for path, _ in jax.tree_util.tree_leaves_with_path(params)]
    assert all(any(fnmatchcase(path, pattern) for path in paths) for pattern in stage.trainable)
    trained = {path for path in paths if any(fnmatchcase(path, pattern) for pattern in stage.trainable)}
    assert not any(path.startswith("encoder_image/high/") for path in trained), "SAM stays frozen"
    assert any(path.startswith("encoder_image/low/") for path in trained) == (name == "instruct")
    assert any(path.startswith("llm/") for path in trained) == (name != "warm_up")
