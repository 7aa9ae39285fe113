"""The plan of one stage of an experiment on one set of chips: figures, compiled for TPUs and estimated for GPUs."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import jax

from mllm_jax.errors import ConfigError
from mllm_jax.layers.stack import REMAT_POLICIES
from mllm_jax.planning.arithmetic import analytic_account, device_bytes, model_flops, remat_of, whole_bytes
from mllm_jax.planning.compile import OutOfMemory, abstract_step, compile_step, topology_mesh
from mllm_jax.planning.hlo import FUSED_SCATTER, Account
from mllm_jax.planning.roofline import Roofline, roofline
from mllm_jax.planning.topologies import Topology
from mllm_jax.sharding.chips import GIB
from mllm_jax.sharding.mesh import AXES, mesh_sizes
from mllm_jax.training.config import Experiment
from mllm_jax.training.flops import PartFlops
from mllm_jax.training.stage import StageProgram


@dataclass(frozen=True)
class Memory:
    """Bytes of one device.

    Attributes:
        parameters, frozen, optimizer, batch: the inputs of the step.
        whole: the part of the first three that fsdp does not split.
        temporaries: activations, gradients and all other intermediates; None if nothing was compiled.
        peak: largest memory use at any time, which decides whether the step fits. For a step that does not fit it is
            what the compiler reports, or None.
        available: bytes that a program may use.
    """

    parameters: int
    frozen: int
    optimizer: int
    batch: int
    temporaries: float | None
    peak: float | None
    available: float
    whole: int = 0

    @property
    def state(self) -> int:
        """Returns the bytes that are held between steps."""
        return self.parameters + self.frozen + self.optimizer


@dataclass(frozen=True)
class Plan:
    """The figures that `mllm plan` prints; times in seconds, FLOPs of a step over all devices unless noted.

    Attributes:
        fits: whether the step fits; None if that cannot be known without compiling.
        compiled: whether the step was compiled; else all is estimated from shapes.
        model_flops: FLOPs that the model needs, by part, without recomputation and with all attention products.
        dot_flops, kernel_flops: FLOPs of the program's products, and of its attention kernels without skipped blocks.
        dense_flops: both, with those blocks; comparable with `model_flops`.
        collectives: (kind, link, runs, bytes that a device sends) a step.
        unfused_wire_bytes: total bytes sent, with each fused all-reduce-scatter at the cost of an all-reduce.
        notes: limits of the figures.
        advice: proposed changes.
    """

    config: str
    stage: str
    topology: str
    chips: int
    devices: int
    mesh: dict[str, int]
    rows: int
    length: int
    accumulate: int
    remat: str
    compiled: bool
    fits: bool | None
    memory: Memory
    model_flops: dict[str, PartFlops]
    peak_flops: float
    lower_seconds: float | None = None
    compile_seconds: float | None = None
    dot_flops: float | None = None
    kernel_flops: float | None = None
    dense_flops: float | None = None
    collectives: tuple[tuple[str, str, int, float], ...] = ()
    unfused_wire_bytes: float | None = None
    times: Roofline | None = None
    notes: tuple[str, ...] = ()
    advice: tuple[str, ...] = ()
    hlo: str = field(default="", repr=False)

    @property
    def flops(self) -> int:
        """Returns the FLOPs that the model needs in a step."""
        return sum(part.total for part in self.model_flops.values())

    @property
    def compiled_flops(self) -> float | None:
        return None if self.dot_flops is None else self.dot_flops + self.kernel_flops

    @property
    def recompute(self) -> float | None:
        """Returns compiled FLOPs over model FLOPs; the excess over 1 is recomputation."""
        return self.dense_flops / self.flops if self.dense_flops is not None else None

    @property
    def tokens(self) -> int:
        return self.rows * self.length

    def mfu(self, seconds: float) -> float:
        """Returns the share of the chips' peak that the model's FLOPs are in a step of n seconds."""
        return self.flops / (seconds * self.peak_flops)

    def to_json(self) -> dict:
        """Returns every figure, including derived ones."""
        values = {name: value for name, value in asdict(self).items() if name != "hlo"}
        values |= {
            "flops": self.flops,
            "compiled_flops": self.compiled_flops,
            "recompute": self.recompute,
            "tokens": self.tokens,
        }
        values["memory"] |= {"state": self.memory.state}
        if self.times is not None:
            seconds = {name: getattr(self.times, name) for name in ("overlapped", "serial", "expected")}
            values["times"] |= seconds | {"bound": self.times.bound}
            values["mfu"] = {name: self.mfu(value) for name, value in seconds.items()}
        return values

    def write(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(self.to_json(), indent=2) + "\n")


def stage_index(experiment: Experiment, name: str | None) -> int:
    """Returns the index of a stage, the last if None. Raises ConfigError if there is none of that name."""
    names = [stage.name for stage in experiment.stages]
    if name is not None and name not in names:
        raise ConfigError(f"stage {name!r} of {experiment.name}", f"one of {', '.join(names)}", "name one of those")
    return len(names) - 1 if name is None else names.index(name)


def make_plan(experiment: Experiment, topology: Topology, stage: str | None = None) -> Plan:
    """Plans a stage, the last if None. For a TPU it is compiled; a step that does not fit also gives a plan.

    Raises:
        PlanError: no TPU compiler.
        ConfigError: a mesh that does not use all chips.
    """
    index = stage_index(experiment, stage)
    if topology.is_tpu:
        mesh = topology_mesh(experiment.mesh, topology)
    else:
        mesh = jax.sharding.AbstractMesh(mesh_sizes(experiment.mesh, topology.devices), AXES)
    program = abstract_step(experiment, index, mesh)
    plan = _described(experiment, index, topology, program)
    if not topology.is_tpu:
        return _estimated(plan, topology, program)
    try:
        compiled = compile_step(program, topology)
    except OutOfMemory as error:
        memory = replace(plan.memory, peak=error.needed, available=error.available or plan.memory.available)
        plan = replace(plan, fits=False, memory=memory, notes=(*plan.notes, *_first_lines(error.given)))
        return replace(plan, advice=_advice(plan))
    counted = compiled.account
    coordinates = [device.coords for device in mesh.devices.flat]
    memory = replace(plan.memory, temporaries=compiled.temporaries, peak=compiled.peak)
    notes = list(plan.notes)
    if unknown := list(dict.fromkeys(counted.unknown)):
        notes.append("not counted: " + "; ".join(unknown[:4]) + (" ..." if len(unknown) > 4 else ""))
    if counted.wire_bytes(FUSED_SCATTER):
        notes.append(
            "all-reduce-scatter: an all-reduce of which a chip keeps its slice; counted as the reduce-scatter that "
            f"the chips run. As all-reduces all would be {counted.wire_bytes_unfused() / 1e9:.2f} GB."
        )
    plan = replace(
        plan,
        fits=compiled.peak <= memory.available,
        memory=memory,
        lower_seconds=compiled.lower_seconds,
        compile_seconds=compiled.compile_seconds,
        **_figures(counted, topology),
        times=roofline(counted, topology, coordinates),
        notes=tuple(notes),
        hlo=compiled.text,
    )
    return replace(plan, advice=_advice(plan))


def _described(experiment: Experiment, index: int, topology: Topology, program: StageProgram) -> Plan:
    """Returns the plan before anything is compiled."""
    stage, sizes = experiment.stages[index], dict(program.mesh.shape)
    given = program.state.params, program.frozen, program.state.opt_state, program.batch
    memory = Memory(*map(device_bytes, given), None, None, topology.chip.device_hbm, whole_bytes(program))
    notes = []
    if memory.whole > 0.05 * memory.available:
        notes.append(
            f"{memory.whole / GIB:.1f} GiB of parameters and optimizer are not split over devices: fsdp "
            f"{sizes['fsdp']} does not divide their sizes"
        )
    over = sizes["data"] * sizes["fsdp"]
    piece = stage.data.rows // stage.accumulate
    if piece % over:
        what = "rows" if stage.accumulate == 1 else f"rows in {stage.accumulate} pieces of {piece}"
        notes.append(
            f"{stage.data.rows} {what}, which data x fsdp = {over} does not divide: devices compute the same rows"
        )
    return Plan(
        experiment.name,
        stage.name,
        topology.name,
        topology.chips,
        topology.devices,
        sizes,
        stage.data.rows,
        stage.data.length,
        stage.accumulate,
        remat_of(experiment.model),
        topology.is_tpu,
        None,
        memory,
        model_flops(program),
        topology.chips * topology.chip.flops,
        notes=tuple(notes),
    )


def _figures(counted: Account, topology: Topology) -> dict:
    """Returns the counts of a device in the form of a plan's fields."""
    flops = {name: getattr(counted, name) * topology.devices for name in ("dot_flops", "kernel_flops", "dense_flops")}
    sent = tuple((kind, link, n, sent) for (kind, link), (n, sent) in counted.by_kind().items())
    return flops | dict(collectives=sent, unfused_wire_bytes=counted.wire_bytes_unfused())


def _estimated(plan: Plan, topology: Topology, program: StageProgram) -> Plan:
    counted = analytic_account(plan.model_flops, plan.remat, program, topology)
    notes = (
        *plan.notes,
        "estimated from shapes, nothing compiled: the memory excludes activations, kernels reach their peak, and of "
        "the collectives only those of fsdp and data are counted",
    )
    plan = replace(
        plan,
        fits=None if plan.memory.state < plan.memory.available else False,
        **_figures(counted, topology),
        times=_gpu_roofline(counted, topology),
        notes=notes,
    )
    return replace(plan, advice=_advice(plan))


def _gpu_roofline(counted: Account, topology: Topology) -> Roofline:
    chip = topology.chip
    return Roofline(
        counted.flops / chip.flops,
        counted.hbm_bytes / chip.hbm_bandwidth,
        counted.ici_bytes / chip.link_bandwidth,
        counted.dcn_bytes / chip.dcn_bandwidth,
        chip.efficiency,
    )


def _first_lines(message: str, count: int = 2) -> list[str]:
    lines = [line.strip() for line in message.splitlines() if line.strip()]
    return [line if len(line) < 300 else line[:297] + "..." for line in lines[:count]]


def _advice(plan: Plan) -> tuple[str, ...]:
    """Returns proposed changes: first against waste, then, if the step does not fit, to make it smaller."""
    advice, mesh = [], plan.mesh
    over = mesh["data"] * mesh["fsdp"]
    piece = plan.rows // plan.accumulate
    if piece % over:
        shared = math.gcd(piece, over)
        rest = over // shared
        advice.append(
            f"give data x fsdp {shared} devices and tensor or context the other {rest * mesh['tensor']}, or "
            f"set the rows to a multiple of {over * plan.accumulate}"
        )
    if plan.fits is not False:
        return tuple(advice)
    memory = plan.memory
    if memory.whole > 0.05 * memory.available and mesh["fsdp"] % 2 == 0:
        advice.append(
            f"mesh.fsdp {mesh['fsdp'] // 2} and mesh.data {mesh['data'] * 2}, or less fsdp, splits what is whole "
            "now; --search finds the largest that does"
        )
        return tuple(advice)
    if memory.state > 0.9 * memory.available:
        need = math.ceil(memory.state * plan.chips / (0.7 * memory.available))
        takes = f"parameters and optimizer take {memory.state / GIB:.1f} GiB a device"
        if mesh["data"] > 1:
            wide = mesh["data"] * mesh["fsdp"]
            advice.append(
                f"{takes}: shard them over the devices that hold copies, with mesh.fsdp {wide} and mesh.data 1"
            )
        else:
            less = "" if memory.frozen == 0 else ", or hold frozen parameters in bfloat16 (frozen_dtype)"
            advice.append(f"{takes}: take about {need} chips{less}")
        return tuple(advice)
    if plan.remat not in ("full", "offload"):
        advice.append(f"remat 'full' instead of {plan.remat!r}: activations of one layer at a time")
    elif plan.remat == "full" and "offload" in REMAT_POLICIES:
        advice.append("remat 'offload': the input of each layer goes to the host's memory")
    if piece // over > 1:
        advice.append(f"accumulate {plan.accumulate * 2}: half as many rows a device at a time")
    else:
        advice.append(
            f"a device has one row of {plan.length} positions at a time: split rows or layers, with mesh.context 2 or "
            f"mesh.tensor 2 and mesh.fsdp {max(1, mesh['fsdp'] // 2)}, or shorten the rows"
        )
    advice.append("--search tries such changes")
    return tuple(advice)
