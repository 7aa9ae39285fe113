"""What a step does on GPUs, from shapes alone: no GPU compiler runs without a GPU, so all of this is a lower bound."""

from __future__ import annotations

from collections.abc import Mapping

import jax

from mllm_jax.planning.arithmetic import device_bytes
from mllm_jax.planning.hlo import Account, Collective, ring_bytes
from mllm_jax.planning.topologies import Topology
from mllm_jax.training.flops import PartFlops
from mllm_jax.training.stage import StageProgram

COMPUTE_BYTES = 2  # parameters and gradients move in bf16


def analytic_account(parts: Mapping[str, PartFlops], remat: str, program: StageProgram, topology: Topology) -> Account:
    """FLOPs with what remat computes again, the state's way through HBM, and the collectives of data and fsdp.

    Args:
        parts: model FLOPs over all devices.
        remat: "full" computes the forward pass of what has a backward pass twice.
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
        # Axes are laid out with `data` outermost, so that fsdp fills nodes first.
        inner = sizes["fsdp"] * sizes["context"] * sizes["tensor"]
        in_node = topology.chips_a_slice // (sizes["context"] * sizes["tensor"] if axis == "fsdp" else inner)
        nodes = max(1, group // max(1, in_node))
        ici, dcn = ring_bytes(kind, size, group, nodes)
        found.append(Collective(kind, times, group, nodes, size, times * ici, times * dcn))
    return found


def _elements(program: StageProgram, tree) -> int:
    return sum(device_bytes(leaf) // leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))
