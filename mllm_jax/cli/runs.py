"""Functions that several commands share: they open folders and set the devices of a CPU."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mllm_jax.errors import CheckpointError, ConfigError
from mllm_jax.training.config import Experiment
from mllm_jax.training.operations.distributed import Hosts

if TYPE_CHECKING:
    from mllm_jax.generation.assistant import Assistant


def experiment_of(run: Path) -> Experiment:
    """Reads the experiment of a run; warns if some of its stages are not finished."""
    from mllm_jax.checkpoints.run import RunFolder

    folder = RunFolder(run)
    experiment = folder.experiment()
    if unfinished := folder.unfinished(experiment):
        print(f"warning: {run} is trained in part: stage {', '.join(unfinished)} has not ended", file=sys.stderr)
    return experiment


MOST_DEVICES = 8  # default maximum number of devices that a CPU is presented as


def use_cpu_devices(experiment: Experiment, hosts: Hosts = Hosts(), *, say: bool = False) -> None:
    """Presents the CPU as several devices; call it before any use of a device. XLA_FLAGS take precedence.

    Args:
        hosts: the processes that train together.
        say: print their number.
    """
    from mllm_jax.sharding.cpu import cores, on_cpu, prepare_cpu
    from mllm_jax.training.operations.distributed import resolve
    from mllm_jax.training.operations.host import enough_threads, keep_freed_memory

    prepare_cpu()
    given = "xla_force_host_platform_device_count" in os.environ.get("XLA_FLAGS", "")
    devices = experiment.cpu_devices
    # Several processes would have to agree on a number, so whoever starts them chooses it.
    if devices is None and not given and on_cpu() and resolve(hosts) is None:
        devices = fitting_cpu_devices(experiment, cores())
        if say:
            print(f"{devices} CPU device(s) on {cores()} core(s); --cpu-devices N takes another number", flush=True)
    if devices:
        keep_freed_memory()
        enough_threads(devices)
    if devices and not given:
        _set_cpu_devices(devices, required=experiment.cpu_devices is not None)


def fitting_cpu_devices(experiment: Experiment, cores: int) -> int:
    """Returns the largest number of devices, at most one a core, whose mesh divides the rows of every stage, or 1."""
    from mllm_jax.sharding.mesh import mesh_sizes

    rows = [stage.data.rows // stage.accumulate for stage in experiment.stages]
    rows += [stage.validation.rows for stage in experiment.stages if stage.validation is not None]
    for devices in range(min(cores, MOST_DEVICES), 1, -1):
        try:
            data, fsdp, *_ = mesh_sizes(experiment.mesh, devices)
        except ConfigError:  # the mesh needs another number of devices
            continue
        if not any(count % (data * fsdp) for count in rows):
            return devices
    return 1


def _set_cpu_devices(devices: int, *, required: bool) -> None:
    import jax

    try:
        jax.config.update("jax_num_cpu_devices", devices)
    except RuntimeError:  # devices are in use already, as in a program that calls a command
        if required:
            raise


def assistant_of(
    folder: Path, *, dtype: Any = None, check: Callable[[Any], None] | None = None, **options: Any
) -> Assistant:
    """Opens a model that writes text, from a run or a model's folder; warns if the run is not finished.

    Args:
        dtype: of the computation; None: as stored.
        check: refuses a model's config, before its weights are read.
        options: see `Assistant.load`.
    """
    from mllm_jax.checkpoints.native import is_native
    from mllm_jax.checkpoints.run import is_run
    from mllm_jax.generation.assistant import Assistant, no_text, writes_text
    from mllm_jax.models.registry import pretrained_config

    if not is_native(folder) and not any((folder / name).is_file() for name in ("config.json", "model_index.json")):
        raise CheckpointError(f"{folder}: no config.json", "a folder of a model, or of a run", "check the path")
    if is_run(folder):
        experiment = experiment_of(folder)
        use_cpu_devices(experiment)
        config = experiment.model
    else:
        config = pretrained_config(folder)
    if not writes_text(config):  # checked before the weights are read
        raise no_text(config)
    if check is not None:
        check(config)
    return Assistant.load(folder, dtype=dtype, **options)
