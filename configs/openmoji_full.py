"""The quickstart's stages on all pictures; more steps (--stages.4.steps 6000) go on learning.

mllm train configs/openmoji_full.py
"""

import runpy
from pathlib import Path

from mllm_jax.training.config import Experiment

STEPS = {"language": 600, "contrastive": 400, "align": 20, "describe": 250, "instruct": 650}


def config() -> Experiment:
    quickstart = runpy.run_path(str(Path(__file__).with_name("quickstart.py")))
    return quickstart["experiment"]("openmoji_full", "full", STEPS, variants=8)
