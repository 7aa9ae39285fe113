"""What shapes alone say of a stage's memory, before anything is compiled."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AbstractMesh

from mllm_jax.planning.compile import abstract_step
from mllm_jax.sharding.logical import axes_of
from mllm_jax.sharding.mesh import AXES, MeshConfig
from mllm_jax.training.config import Experiment
from mllm_jax.training.stage import StageProgram

# Norms and biases stay whole everywhere, and are no more than this share of a model.
SMALL = 0.02


def device_bytes(tree) -> int:
    """What one device holds of a tree of ShapeDtypeStructs with shardings."""

    def one(leaf):
        return int(np.prod(leaf.sharding.shard_shape(leaf.shape), dtype=np.int64)) * leaf.dtype.itemsize

    return sum(map(one, jax.tree.leaves(tree)))


def whole_bytes(program: StageProgram) -> int:
    """Bytes of parameters and optimizer that `fsdp` leaves whole on every device; 0 without that axis.

    A size that the axis does not divide is not split: InternViT-6B's 3,200 by 256 devices, for instance.
    """
    if program.mesh.shape["fsdp"] == 1:
        return 0
    leaves = [leaf for leaf in jax.tree.leaves(_state(program)) if not _split(leaf.sharding.spec)]
    return device_bytes(leaves)


def dividing_fsdp(experiment: Experiment, index: int, mesh: MeshConfig) -> int:
    """The largest half, quarter, ... of the mesh's fsdp that splits nearly all of a stage's parameters.

    It is the whole of fsdp too where none does better.
    """
    fsdp = mesh.fsdp
    while fsdp > 1:
        program = _on(experiment, index, MeshConfig(mesh.data, fsdp, mesh.context, mesh.tensor))
        # Split, the same bytes are 1/fsdp on each device.
        whole = whole_bytes(program)
        state = device_bytes(_state(program))
        if whole <= SMALL * (whole + (state - whole) * fsdp):
            return fsdp
        if fsdp % 2:
            break
        fsdp //= 2
    return mesh.fsdp


def least_bytes(experiment: Experiment, index: int) -> int:
    """What a device needs at least: parameters and optimizer, and what the LLM's layers keep of one piece.

    Every policy of rematerialisation but `offload` keeps what enters a layer, "dots" and "none" the MLP's first
    products as well.

    Args:
        experiment: with every size of its mesh given.
    """
    program = _on(experiment, index, experiment.mesh)
    state = device_bytes(_state(program))
    llm, stage, sizes = experiment.model.llm, experiment.stages[index], program.mesh.shape
    if llm is None or llm.remat == "offload":
        return state
    rows = max(1, stage.data.rows // stage.accumulate // (sizes["data"] * sizes["fsdp"]))
    places = rows * stage.data.length // sizes["context"]
    width = llm.hidden_size
    if llm.remat != "full":
        width += (1 + getattr(llm, "gated", False)) * getattr(llm, "mlp_size", 0) // sizes["tensor"]
    return state + places * llm.num_layers * width * jnp.dtype(llm.dtype).itemsize


def _on(experiment: Experiment, index: int, mesh: MeshConfig) -> StageProgram:
    sizes = tuple(getattr(mesh, axis) for axis in AXES)
    return abstract_step(experiment, index, AbstractMesh(sizes, AXES))


def _state(program: StageProgram):
    return program.state.params, program.frozen, program.state.opt_state


def _split(spec) -> bool:
    return any("fsdp" in axes_of(entry) for entry in spec)
