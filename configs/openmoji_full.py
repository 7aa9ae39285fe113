"""The stages of openmoji_scenes.py on all images: four times as many images, fewer scenes, other numbers of steps.

mllm train configs/openmoji_full.py
"""

import runpy
from pathlib import Path

from mllm_jax.training.config import Experiment

STEPS = {"language": 400, "contrastive": 900, "align": 20, "describe": 450, "instruct": 750}
DECAY = {"contrastive": 0.5, "describe": 0.1, "instruct": 0.1}
SHARES = {
    "language": {"scenes": 0.3},
    "contrastive": {"scenes": 0.25, "categories": 0.75},
    "describe": {"names": 0.9, "places": 0.1},
    "instruct": {"names": 0.1, "yes_no": 0.2, "questions": 0.5, "scenes": 0.1, "matches": 0.1},
}


def config() -> Experiment:
    scenes = runpy.run_path(str(Path(__file__).with_name("openmoji_scenes.py")))
    # per_base=1: nine bases of ten have one form; with three copies of each, persons would be only a fifth.
    return scenes["experiment"]("openmoji_full", "full", STEPS, DECAY, SHARES, variants=8, per_base=1)
