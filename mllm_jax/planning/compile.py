"""Ahead-of-time compilation of a training step for a TPU slice, on any machine: no data, no weights, no TPU."""

from __future__ import annotations

import importlib
import importlib.util
import os
import re
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import jax
from jax.sharding import Mesh

from mllm_jax.errors import PlanError
from mllm_jax.planning.hlo import Account, account
from mllm_jax.planning.topologies import Topology
from mllm_jax.sharding.mesh import MeshConfig, make_mesh
from mllm_jax.training.config import Experiment
from mllm_jax.training.features import stage_spec
from mllm_jax.training.stage import StageProgram, build_stage


class OutOfMemory(PlanError):
    """A step that does not fit into the chips' HBM.

    Attributes:
        needed, available: bytes a device, as the compiler reports them; None if it does not.
    """

    def __init__(self, message: str, what: str):
        super().__init__(message.strip(), f"{what} within the HBM of a chip", "follow the advice of the plan")
        needed = re.search(r"(?:Used |\()([\d.]+)([KMGT]?)(?:i?B)?\)? (?:of|exceeds)", message)
        available = re.search(r"(?:of|available HBM \()\s*([\d.]+)([KMGT]?)(?:\)| hbm)", message)
        self.needed, self.available = (_bytes(found) for found in (needed, available))


def _bytes(found: re.Match | None) -> float | None:
    return float(found[1]) * 2 ** {"": 0, "K": 10, "M": 20, "G": 30, "T": 40}[found[2]] if found else None


@dataclass(frozen=True)
class CompiledStep:
    """A compiled step; bytes are those of one device.

    Attributes:
        peak: largest memory use at any time: arguments, results and temporaries.
        temporaries: largest memory use of temporaries.
        lower_seconds, compile_seconds: time of tracing and of compiling.
    """

    account: Account
    peak: int
    arguments: int
    temporaries: int
    lower_seconds: float
    compile_seconds: float
    text: str


def topology_devices(topology: Topology) -> list:
    """Returns the devices of a slice as the TPU compiler represents them.

    Raises:
        PlanError: no libtpu, or one that does not know the slice.
    """
    if importlib.util.find_spec("libtpu") is None:
        raise PlanError(
            f"a plan for {topology.name} without libtpu, the TPU compiler",
            "libtpu of the version that belongs to jax; no TPU is needed",
            "pip install 'mllm-jax[plan]'",
        )
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")  # do not look for a TPU machine's metadata
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")  # several plans at once
    from jax.experimental import topologies

    with _quiet():
        try:
            found = topologies.get_topology_desc(
                platform="tpu", topology_name=topology.libtpu_name, **topology.libtpu_options
            )
        except Exception as error:
            raise PlanError(
                f"{topology.name}: {error}", "a slice that this libtpu knows", "update jax and libtpu, or name another"
            ) from error
    return list(found.devices)


def topology_mesh(config: MeshConfig, topology: Topology) -> Mesh:
    """Returns the mesh that training makes on such a slice; `data` is the axis that spans several slices.

    Raises:
        ConfigError: sizes whose product is not the number of devices, or a data axis that the slices do not divide.
    """
    return make_mesh(config, topology_devices(topology))


def abstract_step(experiment: Experiment, index: int, mesh: Mesh) -> StageProgram:
    """Returns the program that `training.loop` runs for a stage, from the config alone."""
    return build_stage(experiment, index, mesh, stage_spec(experiment, experiment.stages[index]))


def compile_step(program: StageProgram, topology: Topology) -> CompiledStep:
    """Compiles a step for a TPU slice. Raises OutOfMemory if it does not fit."""
    began = time.monotonic()
    lowered = program.step.lower(program.state, program.frozen, program.batch)
    lowered_at = time.monotonic()
    with _quiet():
        try:
            compiled = lowered.compile()
        except jax.errors.JaxRuntimeError as error:
            if "RESOURCE_EXHAUSTED" in str(error) or "out of memory" in str(error).lower():
                raise OutOfMemory(str(error), f"the step on {topology.name}") from error
            raise
    seconds = time.monotonic() - lowered_at
    memory = compiled.memory_analysis()
    text = _text(compiled)
    slices = [getattr(device, "slice_index", 0) for device in program.mesh.devices.flat]
    return CompiledStep(
        account(text, slices),
        memory.peak_memory_in_bytes,
        memory.argument_size_in_bytes,
        memory.temp_size_in_bytes,
        lowered_at - began,
        seconds,
        text,
    )


def _text(compiled) -> str:
    """Returns the compiled module's text, with the tables of the masks of Pallas kernels, if there are any."""
    text = compiled.as_text()
    if "tpu_custom_call" not in text or "{...}" not in text:
        return text
    [module] = compiled.runtime_executable().hlo_modules()
    options = importlib.import_module(type(module).__module__).HloPrintOptions()
    options.print_large_constants = True
    return module.to_string(options)


@contextmanager
def _quiet() -> Iterator[None]:
    """Hides what libtpu's C++ writes to stderr about the missing TPU machine; errors come as exceptions."""
    sys.stderr.flush()
    try:
        kept = os.dup(2)
    except OSError:  # no stderr
        yield
        return
    with tempfile.TemporaryFile() as sink:
        os.dup2(sink.fileno(), 2)
        try:
            yield
        finally:
            sys.stderr.flush()
            os.dup2(kept, 2)
            os.close(kept)
