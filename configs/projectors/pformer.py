"""The study's model with this projector; see study.py."""

import runpy
from pathlib import Path

from mllm_jax.training.config import Experiment


def config() -> Experiment:
    return runpy.run_path(str(Path(__file__).with_name("study.py")))["experiment"](Path(__file__).stem)
