"""The assistant of a folder, a run or a model alike."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mllm_jax.cli.runs import experiment_of, is_model
from mllm_jax.generation.assistant import Assistant


def assistant_of(folder: Path, *, dtype: Any = None, **options: Any) -> Assistant:
    """Opens the model of a run, or of a model's folder; raises what `Assistant.load` and `load_run` do.

    Args:
        dtype: what to compute in; None is what is stored.
        options: see `Assistant.load`.
    """
    if is_model(folder):
        return Assistant.load(folder, dtype=dtype, **options)

    from mllm_jax.checkpoints.hf import float_dtype
    from mllm_jax.checkpoints.run import RunFolder
    from mllm_jax.errors import ConfigError
    from mllm_jax.models.run_weights import load_run

    experiment = experiment_of(folder)
    if experiment.model.llm is None:
        raise ConfigError(
            f"{folder}, which trained a {type(experiment.model).__name__.removesuffix('Config')}",
            "a model that generates text",
            "name another run; `mllm embed` compares pictures and texts with this one",
        )
    _, model, params, processor, mesh = load_run(RunFolder(folder))
    if dtype is not None:
        model = experiment.model.with_dtype(str(float_dtype(dtype))).make()
    return Assistant(model, params, processor, mesh=mesh, **options)
