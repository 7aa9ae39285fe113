"""What several commands ask of a folder, and what must be set before a device is touched."""

from __future__ import annotations

import os
import sys
from pathlib import Path

from mllm_jax.training.config import Experiment


def experiment_of(run: Path) -> Experiment:
    """Reads the experiment of a run; warns where stages of it are not finished."""
    from mllm_jax.checkpoints.run import RunFolder

    folder = RunFolder(run)
    experiment = folder.experiment()
    if unfinished := folder.unfinished(experiment):
        print(f"warning: {run} is trained in part: no stage {', '.join(unfinished)} yet", file=sys.stderr)
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
