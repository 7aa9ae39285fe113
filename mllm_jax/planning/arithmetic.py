"""Estimates from shapes, before anything is compiled: a stage's memory and FLOPs, and its cost on GPUs.

No GPU compiler runs without a GPU, so the cost on GPUs is a lower bound.
"""

from __future__ import annotations

from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AbstractMesh

from mllm_jax.checkpoints.fields import field_value
from mllm_jax.layers.compute import WithCompute
from mllm_jax.planning.compile import abstract_step
from mllm_jax.planning.hlo import Account, Collective, ring_bytes
from mllm_jax.planning.topologies import Topology
from mllm_jax.sharding.logical import axes_of
from mllm_jax.sharding.mesh import AXES, MeshConfig
from mllm_jax.training.config import Experiment
from mllm_jax.training.flops import PartFlops
from mllm_jax.training.stage import StageProgram

# Norms and biases are never split; they are at most this share of a model.
SMALL = 0.02


def device_bytes(tree) -> int:
    """Returns the bytes that one device holds of a tree of ShapeDtypeStructs with shardings."""

    def one(leaf):
        return int(np.prod(leaf.sharding.shard_shape(leaf.shape), dtype=np.int64)) * leaf.dtype.itemsize

    return sum(map(one, jax.tree.leaves(tree)))


def whole_bytes(program: StageProgram) -> int:
    """Returns the bytes of parameters and optimizer that `fsdp` leaves whole on every device; 0 without that axis.

    A size that the axis does not divide is not split: InternViT-6B's 3,200 by 256 devices, for instance.
    """
    if program.mesh.shape["fsdp"] == 1:
        return 0
    leaves = [leaf for leaf in jax.tree.leaves(_state(program)) if not _split(leaf.sharding.spec)]
    return device_bytes(leaves)


def dividing_fsdp(experiment: Experiment, index: int, mesh: MeshConfig) -> int:
    """Returns the largest half, quarter, ... of the mesh's fsdp that splits nearly all of a stage's parameters.

    Returns the whole fsdp if none does better.
    """
    fsdp = mesh.fsdp
    while fsdp > 1:
        program = _on(experiment, index, MeshConfig(mesh.data, fsdp, mesh.context, mesh.tensor))
        # If split, each device would hold 1/fsdp of these bytes.
        whole = whole_bytes(program)
        state = device_bytes(_state(program))
        if whole <= SMALL * (whole + (state - whole) * fsdp):
            return fsdp
        if fsdp % 2:
            break
        fsdp //= 2
    return mesh.fsdp


def least_bytes(experiment: Experiment, index: int) -> int:
    """Returns the bytes that a device needs at least: parameters, optimizer, and what the LLM's layers keep of a piece.

    Every rematerialisation policy but `offload` keeps the input of each layer; "dots" and "none" also keep the MLP's
    first products.

    Args:
        experiment: an experiment with every size of its mesh given.
    """
    program = _on(experiment, index, experiment.mesh)
    state = device_bytes(_state(program))
    llm = experiment.model_of().parts.get("llm")
    stage, sizes = experiment.stages[index], program.mesh.shape
    if llm is None or llm.remat == "offload":
        return state
    rows = max(1, stage.data.rows // stage.accumulate // (sizes["data"] * sizes["fsdp"]))
    positions = rows * stage.data.length // sizes["context"]
    width = llm.hidden_size
    if llm.remat != "full":
        width += (1 + field_value(llm, "gated", False)) * getattr(llm, "mlp_size", 0) // sizes["tensor"]
    return state + positions * llm.num_layers * width * jnp.dtype(llm.dtype).itemsize


def _on(experiment: Experiment, index: int, mesh: MeshConfig) -> StageProgram:
    sizes = tuple(getattr(mesh, axis) for axis in AXES)
    return abstract_step(experiment, index, AbstractMesh(sizes, AXES))


def _state(program: StageProgram):
    return program.state.params, program.frozen, program.state.opt_state


def _split(spec) -> bool:
    return any("fsdp" in axes_of(entry) for entry in spec)


_ORDER = ("encoder", "projector", "", "llm")  # kinds of parts in the order of the data; "" is any other kind


def remat_of(config) -> str:
    """Returns the policy of the LLM, or of the first part that has one; "none" if there is none."""
    parts = config.parts
    first = [parts["llm"]] if "llm" in parts else []
    return next((part.remat for part in (*first, *parts.values()) if isinstance(part, WithCompute)), "none")


def model_flops(program: StageProgram) -> dict[str, PartFlops]:
    """Returns the FLOPs of a step over all devices, by part: without recomputation, with all attention products.

    A frozen part counts for what it computes: its forward pass, and a backward pass if a trained part comes before it.
    """
    parts = {part: part.rpartition("_")[0] or part for part in {*program.state.params, *program.frozen}}
    order = {part: (_ORDER.index(kind) if kind in _ORDER else 2, part) for part, kind in parts.items()}
    return program.flops_by_part(sorted(order, key=order.__getitem__))


COMPUTE_BYTES = 2  # parameters and gradients are communicated in bf16


def analytic_account(parts: Mapping[str, PartFlops], remat: str, program: StageProgram, topology: Topology) -> Account:
    """Returns the FLOPs with remat's recomputation, the state's HBM traffic, and the collectives of data and fsdp.

    Args:
        parts: model FLOPs over all devices.
        remat: "full" computes each forward pass that has a backward pass twice.
    """
    again = sum(part.forward for part in parts.values() if part.backward) if remat == "full" else 0
    flops = (sum(part.total for part in parts.values()) + again) / topology.devices
    sizes = program.mesh.shape
    state = device_bytes((program.state.params, program.state.opt_state))
    local = (_elements(program, program.state.params), _elements(program, program.frozen))
    trained, frozen = (count * COMPUTE_BYTES for count in local)
    passes = 3 if remat == "full" else 2  # forward, again, backward
    weights = (trained + frozen) * sizes["fsdp"]
    counted = Account(dot_flops=flops, dense_flops=flops, hbm_bytes=2 * state + weights * passes)
    group = sizes["fsdp"] * sizes["data"]
    if group > 1:
        counted.collectives += _collectives(trained, frozen, passes, sizes, topology)
    return counted


def _collectives(trained, frozen, passes, sizes, topology: Topology) -> list[Collective]:
    found = []
    for kind, size, axis, times in (
        ("all-gather", trained + frozen, "fsdp", passes),
        ("reduce-scatter", trained * sizes["fsdp"], "fsdp", 1),
        ("all-reduce", trained, "data", 1),
    ):
        group = sizes[axis]
        if group == 1 or not size:
            continue
        # `data` is the outermost axis, so that fsdp fills nodes first.
        inner = sizes["fsdp"] * sizes["context"] * sizes["tensor"]
        in_node = topology.chips_a_slice // (sizes["context"] * sizes["tensor"] if axis == "fsdp" else inner)
        nodes = max(1, group // max(1, in_node))
        ici, dcn = ring_bytes(kind, size, group, nodes)
        found.append(Collective(kind, times, group, nodes, size, times * ici, times * dcn))
    return found


def _elements(program: StageProgram, tree) -> int:
    return sum(device_bytes(leaf) // leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))
