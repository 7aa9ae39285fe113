"""Training of Qwen2.5-VL-7B to plan with: the report's rows of 8,192 (table 2), half of them pictures.

mllm plan configs/plans/qwen25vl_7b.py --topology v5e-256

The report has no batch size; 256 rows are ours.
"""

import runpy
from pathlib import Path

from mllm_jax.data.pipeline import Mixture
from mllm_jax.sharding.mesh import MeshConfig
from mllm_jax.training.config import AdamW, Experiment, Stage, TokenizerConfig
from mllm_jax.training.objectives.next_token import NextToken

LENGTH = 8192
PATCHES = 4 * LENGTH // 2  # four patches are one media token


def config() -> Experiment:
    stage = Stage(
        name="instruct",
        objective=NextToken(),
        trainable=("llm/*",),
        data=Mixture((), rows=256, length=LENGTH, slots={"image": PATCHES}),
        optimizer=AdamW(1e-5, end_factor=0.0, weight_decay=0.05, b2=0.999),
        steps=1000,
        frozen_dtype="bfloat16",
    )
    return Experiment(
        name=Path(__file__).stem,
        model=runpy.run_path(str(Path(__file__).parents[1] / "qwen25vl_7b.py"))["model"](),
        tokenizer=TokenizerConfig(vocab_size=152_064),
        mesh=MeshConfig(data=1, fsdp=-1),
        stages=(stage,),
    )
