"""Estimates of a stage's memory without a compiler, and their use in the search."""

from dataclasses import replace

import jax
import pytest
from jax.sharding import AbstractMesh
from tiny import experiment

from mllm_jax.planning.arithmetic import dividing_fsdp, least_bytes, whole_bytes
from mllm_jax.planning.compile import abstract_step
from mllm_jax.planning.search import candidates
from mllm_jax.planning.topologies import topology
from mllm_jax.sharding.mesh import AXES, MeshConfig
from mllm_jax.training.flops import with_remat


def test_sizes_that_fsdp_does_not_divide_are_named_and_avoided():
    """Checks width 192 on 128 devices: all stays whole; 64 divides it, and the search gives data the other two."""
    odd = experiment(rows=128, length=128, mesh=MeshConfig(1, 128), hidden_size=192, mlp_size=704, num_layers=2)
    abstract = abstract_step(odd, 0, AbstractMesh((1, 128, 1, 1), AXES))
    parameters = sum(leaf.size for leaf in jax.tree.leaves(abstract.state.params))
    assert whole_bytes(abstract) == pytest.approx(3 * 4 * parameters, rel=1e-2)
    assert dividing_fsdp(odd, 0, odd.mesh) == 64
    meshes = {(c.mesh.data, c.mesh.fsdp, c.mesh.tensor) for c in candidates(odd, topology("v5e-128"), 0)}
    assert (2, 64, 1) in meshes and (1, 128, 1) not in meshes


def test_long_rows_are_split_by_the_search_as_well():
    meshes = [c.mesh for c in candidates(experiment(rows=16, length=4096), topology("v5e-16"), 0)]
    assert {mesh.context for mesh in meshes} == {1, 2, 4} and all(mesh.fsdp * mesh.context <= 16 for mesh in meshes)


def test_what_a_device_needs_at_least():
    """Checks sixteen rows of 128 on 16 devices: parameters, AdamW's two copies, and the inputs of two layers."""
    full = experiment(mesh=MeshConfig(1, 16), remat="full")
    state = least_bytes(replace(full, model=with_remat(full.model, "offload")), 0)
    abstract = abstract_step(full, 0, AbstractMesh((1, 16, 1, 1), AXES))
    parameters = sum(leaf.size for leaf in jax.tree.leaves(abstract.state.params))
    assert state == pytest.approx(3 * 4 * parameters / 16, rel=0.02)
    assert least_bytes(full, 0) - state == 128 * 2 * 256 * 2
    assert least_bytes(replace(full, model=with_remat(full.model, "dots")), 0) - state == 128 * 2 * (256 + 2 * 704) * 2
