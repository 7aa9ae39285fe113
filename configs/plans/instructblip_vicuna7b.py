"""InstructBLIP-Vicuna-7B's instruction tuning to plan with: 128 rows, a picture each, only the Q-Former trained.

mllm plan configs/plans/instructblip_vicuna7b.py --topology v5p-128

The paper has no length of a row; 512 is ours.
"""

import runpy
from pathlib import Path

from mllm_jax.data.pipeline import Mixture
from mllm_jax.sharding.mesh import MeshConfig
from mllm_jax.training.config import Experiment, TokenizerConfig


def config() -> Experiment:
    names = runpy.run_path(str(Path(__file__).parents[1] / "instructblip_vicuna7b.py"))
    data = Mixture((), rows=names["ROWS"], length=512, slots={"image": 1})
    return Experiment(
        name=Path(__file__).stem,
        model=names["model"](),
        tokenizer=TokenizerConfig(vocab_size=32_064),
        mesh=MeshConfig(data=1, fsdp=-1),
        stages=(names["instruct"](data),),
    )
