"""InternVL3-8B's fine-tuning by its authors' script, to plan with: 128 rows of 16,384 with up to four pictures.

mllm plan configs/plans/internvl3_8b.py --topology v5e-256 --mesh.fsdp 128 --mesh.tensor 2
"""

import runpy
from pathlib import Path

from mllm_jax.data.pipeline import Mixture
from mllm_jax.sharding.mesh import MeshConfig
from mllm_jax.training.config import Experiment, TokenizerConfig

STEPS = 1000


def config() -> Experiment:
    names = runpy.run_path(str(Path(__file__).parents[1] / "internvl3_8b.py"))
    data = Mixture((), rows=names["ROWS"], length=names["LENGTH"], slots={"image": 4 * (names["MAX_TILES"] + 1)})
    return Experiment(
        name=Path(__file__).stem,
        model=names["model"](),
        tokenizer=TokenizerConfig(vocab_size=151_674),
        mesh=MeshConfig(data=1, fsdp=-1),
        stages=(names["finetune"](data, STEPS),),
    )
