"""A bounded search for the mesh, remat policy and number of pieces with which a stage fits and runs fastest."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import replace

from mllm_jax.errors import ConfigError
from mllm_jax.layers.stack import REMAT_POLICIES
from mllm_jax.planning.arithmetic import dividing_fsdp, least_bytes, remat_of
from mllm_jax.planning.plan import Plan, make_plan, stage_index
from mllm_jax.planning.topologies import Topology
from mllm_jax.sharding.chips import GIB
from mllm_jax.sharding.mesh import AXES, MeshConfig
from mllm_jax.training.config import Experiment, Stage
from mllm_jax.training.flops import with_remat

TENSORS = (1, 2, 4, 8)
CONTEXTS = (1, 2, 4, 8)
PLACES = 1024  # smallest number of positions of a row on a device
PIECES = (1, 2, 4, 8)
POLICIES = tuple(name for name in ("none", "dots", "full", "offload") if name in REMAT_POLICIES)  # each saves more


def candidates(experiment: Experiment, topology: Topology, index: int) -> Iterator[Experiment]:
    """Yields experiments to try, first those that save the least memory and so waste the least time.

    fsdp is inside a slice, as far as it divides the parameters' sizes; data takes the rest and spans slices. tensor is
    tried if it divides the heads, and context if a row has enough positions. Then follow more pieces and more remat.
    """
    stage = experiment.stages[index]
    inside = topology.devices // topology.slices
    heads = getattr(getattr(experiment.model, "llm", None), "num_heads", 0)
    for tensor, context in sorted(itertools.product(TENSORS, CONTEXTS), key=lambda pair: (pair[0] * pair[1], pair[0])):
        if inside % (tensor * context) or (tensor > 1 and heads % tensor):
            continue
        if context > 1 and (stage.data.length % context or stage.data.length // context < PLACES):
            continue
        most = inside // tensor // context
        if not any(_divides(stage, pieces, topology.slices * most) for pieces in PIECES):
            continue
        fsdp = dividing_fsdp(experiment, index, MeshConfig(topology.slices, most, context, tensor))
        mesh = MeshConfig(topology.slices * most // fsdp, fsdp, context, tensor)
        for policy in POLICIES[1:]:
            for pieces in PIECES:
                if _divides(stage, pieces, mesh.data * mesh.fsdp):
                    stages = list(experiment.stages)
                    stages[index] = replace(stage, accumulate=pieces)
                    model = with_remat(experiment.model, policy)
                    yield replace(experiment, mesh=mesh, model=model, stages=tuple(stages))


def _divides(stage: Stage, pieces: int, devices: int) -> bool:
    """Returns whether n devices share the rows of each piece evenly."""
    return stage.data.rows % pieces == 0 and stage.data.rows // pieces % devices == 0


def search(
    experiment: Experiment,
    topology: Topology,
    stage: str | None = None,
    *,
    limit: int = 8,
    tell: Callable[[Plan], None] = lambda plan: None,
) -> tuple[list[Plan], list[Plan]]:
    """Plans at most `limit` candidates.

    A candidate is left out if it saves less memory than an otherwise equal one that did not fit, or if its parameters,
    optimizer and layer inputs exceed the HBM.

    Args:
        tell: function that is called with each new plan.

    Returns:
        (plans that fit, fastest expected step first; all plans).

    Raises:
        ConfigError: no mesh divides the rows, or none can hold the parameters.
    """
    index = stage_index(experiment, stage)
    tried: list[Plan] = []
    least: list[int] = []  # bytes, of what is not worth compiling
    for candidate in candidates(experiment, topology, index):
        if len(tried) == limit:
            break
        if _hopeless(candidate, index, tried):
            continue
        if (needed := least_bytes(candidate, index)) > topology.chip.device_hbm:
            least.append(needed)
            continue
        tried.append(make_plan(candidate, topology, experiment.stages[index].name))
        tell(tried[-1])
    if least and not tried:
        raise ConfigError(
            f"{experiment.name} on {topology.name}: {min(least) / GIB:.1f} GiB a device for parameters, "
            "optimizer and layer inputs alone",
            f"at most {topology.chip.device_hbm / GIB:.1f} GiB",
            "take more chips, or fewer rows",
        )
    if not tried:
        rows = experiment.stages[index].data.rows
        raise ConfigError(
            f"{rows} rows on {topology.name}",
            f"rows that data x fsdp divides, with tensor at most {TENSORS[-1]}",
            "change the stage's data.rows",
        )
    fitting = [plan for plan in tried if plan.fits is not False]
    return sorted(fitting, key=lambda plan: plan.times.expected), tried


def _hopeless(candidate: Experiment, index: int, tried: list[Plan]) -> bool:
    """Returns whether a similar candidate did not fit with as much saving, or fitted with less."""
    stage, mesh = candidate.stages[index], candidate.mesh
    remat = remat_of(candidate.model)
    for plan in tried:
        if any(plan.mesh[axis] != getattr(mesh, axis) for axis in AXES):
            continue
        pieces, kept = stage.accumulate - plan.accumulate, POLICIES.index(remat) - POLICIES.index(plan.remat)
        saves_less, saves_more = max(pieces, kept) <= 0, min(pieces, kept) >= 0
        if (plan.fits is False and saves_less) or (plan.fits and saves_more):
            return True
    return False
