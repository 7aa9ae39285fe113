"""What several commands ask of a folder, and what must be set before a device is touched."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mllm_jax.errors import CheckpointError
from mllm_jax.training.config import Experiment

if TYPE_CHECKING:
    from mllm_jax.generation.assistant import Assistant


def experiment_of(run: Path) -> Experiment:
    """Reads the experiment of a run; warns where stages of it are not finished."""
    from mllm_jax.checkpoints.run import RunFolder

    folder = RunFolder(run)
    experiment = folder.experiment()
    if unfinished := folder.unfinished(experiment):
        print(f"warning: {run} is trained in part: stage {', '.join(unfinished)} has not ended", file=sys.stderr)
    return experiment


def use_cpu_devices(experiment: Experiment) -> None:
    """Presents the CPU as several devices, before anything has touched a device; XLA_FLAGS have the last word."""
    import jax

    from mllm_jax.sharding.cpu import prepare_cpu
    from mllm_jax.training.operations.host import enough_threads, keep_freed_memory

    prepare_cpu()
    if experiment.cpu_devices:
        keep_freed_memory()
        enough_threads(experiment.cpu_devices)
    if experiment.cpu_devices and "xla_force_host_platform_device_count" not in os.environ.get("XLA_FLAGS", ""):
        jax.config.update("jax_num_cpu_devices", experiment.cpu_devices)


def assistant_of(folder: Path, *, dtype: Any = None, **options: Any) -> Assistant:
    """Opens the model of a run, or of a model's folder, that is to write text; says so where a run is not finished.

    Args:
        dtype: what to compute in; None is what is stored.
        options: see `Assistant.load`.
    """
    from mllm_jax.checkpoints.native import is_native
    from mllm_jax.checkpoints.run import is_run
    from mllm_jax.generation.assistant import Assistant, no_text, writes_text
    from mllm_jax.models.registry import pretrained_config

    if not is_native(folder) and not any((folder / name).is_file() for name in ("config.json", "model_index.json")):
        raise CheckpointError(f"{folder}: no config.json", "a folder of a model, or of a run", "check the path")
    config = experiment_of(folder).model if is_run(folder) else pretrained_config(folder)
    if not writes_text(config):  # before the weights are read
        raise no_text(config)
    return Assistant.load(folder, dtype=dtype, **options)
