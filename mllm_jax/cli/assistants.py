"""The assistant of a folder, a run or a model alike."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mllm_jax.checkpoints.native import is_native
from mllm_jax.checkpoints.run import is_run
from mllm_jax.cli.runs import experiment_of
from mllm_jax.errors import CheckpointError
from mllm_jax.generation.assistant import Assistant, no_text, writes_text
from mllm_jax.models.registry import pretrained_config


def assistant_of(folder: Path, *, dtype: Any = None, **options: Any) -> Assistant:
    """Opens the model of a run, or of a model's folder, that is to write text; says so where a run is not finished.

    Args:
        dtype: what to compute in; None is what is stored.
        options: see `Assistant.load`.
    """
    if not is_native(folder) and not any((folder / name).is_file() for name in ("config.json", "model_index.json")):
        raise CheckpointError(f"{folder}: no config.json", "a folder of a model, or of a run", "check the path")
    config = experiment_of(folder).model if is_run(folder) else pretrained_config(folder)
    if not writes_text(config):  # before the weights are read
        raise no_text(config)
    return Assistant.load(folder, dtype=dtype, **options)
