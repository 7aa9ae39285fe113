"""Pre-training of llama2_70b: 4 rows a chip of 512; see language.py.

mllm plan configs/plans/llama2_70b.py --topology v5p-1024
"""

import runpy
from pathlib import Path

from mllm_jax.training.config import Experiment


def config() -> Experiment:
    make = runpy.run_path(str(Path(__file__).with_name("language.py")))["experiment"]
    return make(Path(__file__).stem, rows=2048, length=4096)
