"""configs/any_to_any_openmoji.py with query tokens and MetaQuery's connector (arXiv 2504.06256).

mllm train configs/any_to_any_openmoji_connector.py
"""

import runpy
from pathlib import Path

from mllm_jax.training.config import Experiment


def config() -> Experiment:
    common = runpy.run_path(str(Path(__file__).with_name("any_to_any_openmoji.py")))
    return common["experiment"]("connector", "any_to_any_openmoji_connector")
