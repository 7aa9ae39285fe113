"""A bounded search: which mesh, remat policy and number of pieces let a stage fit, and run fastest."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace

from mllm_jax.errors import ConfigError
from mllm_jax.layers.stack import REMAT_POLICIES
from mllm_jax.planning.model import remat_of
from mllm_jax.planning.plan import Plan, make_plan, stage_index
from mllm_jax.planning.topologies import Topology
from mllm_jax.sharding.mesh import MeshConfig
from mllm_jax.training.config import Experiment
from mllm_jax.training.flops import with_remat

TENSORS = (1, 2, 4, 8)
PIECES = (1, 2, 4, 8)
POLICIES = tuple(name for name in ("none", "dots", "full", "offload") if name in REMAT_POLICIES)  # each saves more


def candidates(experiment: Experiment, topology: Topology, index: int) -> Iterator[Experiment]:
    """Experiments to try, those first that save the least memory and so waste the least time.

    fsdp inside a slice, data over slices; tensor where heads and fsdp leave no row idle; more pieces and more remat.
    """
    stage = experiment.stages[index]
    inside = topology.devices // topology.slices
    heads = getattr(getattr(experiment.model, "llm", None), "num_heads", 0)
    for tensor in TENSORS:
        if inside % tensor or (tensor > 1 and heads % tensor):
            continue
        mesh = MeshConfig(data=topology.slices, fsdp=inside // tensor, tensor=tensor)
        for policy in POLICIES[1:]:
            for pieces in PIECES:
                if stage.data.rows % pieces or stage.data.rows // pieces % (mesh.data * mesh.fsdp):
                    continue
                stages = list(experiment.stages)
                stages[index] = replace(stage, accumulate=pieces)
                yield replace(experiment, mesh=mesh, model=with_remat(experiment.model, policy), stages=tuple(stages))


def search(
    experiment: Experiment,
    topology: Topology,
    stage: str | None = None,
    *,
    limit: int = 8,
    tell: Callable[[Plan], None] = lambda plan: None,
) -> tuple[list[Plan], list[Plan]]:
    """Plans at most `limit` candidates.

    A candidate that saves less memory than one that did not fit, and is alike else, is left out.

    Args:
        tell: is called with each plan as it is made.

    Returns:
        (plans that fit, the fastest expected step first; all that were made).

    Raises:
        ConfigError: no mesh suits the rows.
    """
    index = stage_index(experiment, stage)
    tried: list[Plan] = []
    for candidate in candidates(experiment, topology, index):
        if len(tried) == limit:
            break
        if _hopeless(candidate, index, tried):
            continue
        tried.append(make_plan(candidate, topology, experiment.stages[index].name))
        tell(tried[-1])
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
    """Whether something like it did not fit although it saved as much, or fitted although it saved less."""
    stage, mesh = candidate.stages[index], candidate.mesh
    remat = remat_of(candidate.model)
    for plan in tried:
        if (plan.mesh["fsdp"], plan.mesh["tensor"]) != (mesh.fsdp, mesh.tensor):
            continue
        pieces, kept = stage.accumulate - plan.accumulate, POLICIES.index(remat) - POLICIES.index(plan.remat)
        saves_less, saves_more = max(pieces, kept) <= 0, min(pieces, kept) >= 0
        if (plan.fits is False and saves_less) or (plan.fits and saves_more):
            return True
    return False
