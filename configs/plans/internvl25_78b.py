"""InternVL2.5-78B's second stage, everything trained (arXiv 2412.05271, table 2), to plan with.

mllm plan configs/plans/internvl25_78b.py --topology v5p-128

512 rows of 16,384 tokens with up to 48 tiles, the script's maximum for a row.
"""

import runpy
from pathlib import Path

from mllm_jax.data.pipeline import Mixture
from mllm_jax.sharding.mesh import MeshConfig
from mllm_jax.training.config import AdamW, Experiment, Stage, TokenizerConfig
from mllm_jax.training.objectives.next_token import NextToken


def config() -> Experiment:
    stage = Stage(
        name="finetune",
        objective=NextToken(),
        trainable=("*",),
        data=Mixture((), rows=512, length=16_384, slots={"image": 48}),
        optimizer=AdamW(2e-5, end_factor=0.0, weight_decay=0.05, b2=0.999),
        steps=1000,
    )
    return Experiment(
        name=Path(__file__).stem,
        model=runpy.run_path(str(Path(__file__).parents[1] / "internvl25_78b.py"))["model"](),
        tokenizer=TokenizerConfig(vocab_size=151_674),
        mesh=MeshConfig(data=1, fsdp=-1),
        stages=(stage,),
    )
