"""The quickstart in a separate run folder, for comparison.

mllm train configs/openmoji_scenes.py
"""

import runpy
from pathlib import Path

from mllm_jax.training.config import Experiment


def config() -> Experiment:
    quickstart = runpy.run_path(str(Path(__file__).with_name("quickstart.py")))
    return quickstart["experiment"]("openmoji_scenes", "quickstart", quickstart["STEPS"])
