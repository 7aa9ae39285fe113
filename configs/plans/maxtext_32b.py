"""Pre-training of maxtext_32b: 6 rows a chip of v5p-128, layers split over 4 chips; see language.py.

mllm plan configs/plans/maxtext_32b.py --topology v5p-128
"""

import runpy
from pathlib import Path

from mllm_jax.sharding.mesh import MeshConfig
from mllm_jax.training.config import Experiment


def config() -> Experiment:
    make = runpy.run_path(str(Path(__file__).with_name("language.py")))["experiment"]
    mesh = MeshConfig(data=1, fsdp=-1, tensor=4)
    return make(Path(__file__).stem, rows=384, length=2048, mesh=mesh, remat="dots")
