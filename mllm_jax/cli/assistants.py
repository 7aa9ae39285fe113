"""The assistant of a folder, a run or a model alike."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mllm_jax.checkpoints.run import is_run
from mllm_jax.cli.runs import experiment_of
from mllm_jax.generation.assistant import Assistant


def assistant_of(folder: Path, *, dtype: Any = None, **options: Any) -> Assistant:
    """Opens the model of a run, or of a model's folder, for a command; says so where a run is not finished.

    Args:
        dtype: what to compute in; None is what is stored.
        options: see `Assistant.load`.
    """
    if is_run(folder):
        experiment_of(folder)
    return Assistant.load(folder, dtype=dtype, **options)
