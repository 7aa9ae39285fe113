"""configs/clip_openmoji.py with the sigmoid loss (SigLIP, arXiv 2303.15343).

mllm train configs/siglip_openmoji.py
"""

import runpy
from pathlib import Path

from mllm_jax.training.config import Experiment


def config() -> Experiment:
    clip = runpy.run_path(str(Path(__file__).with_name("clip_openmoji.py")))
    return clip["experiment"]("siglip_openmoji", "sigmoid")
