"""Pre-training of llama2_7b: 4 rows a chip of v5e-256; see language.py.

mllm plan configs/plans/llama2_7b.py --topology v5e-256
"""

import runpy
from pathlib import Path

from mllm_jax.training.config import Experiment


def config() -> Experiment:
    make = runpy.run_path(str(Path(__file__).with_name("language.py")))["experiment"]
    return make(Path(__file__).stem, rows=1024, length=2048)
