"""Twenty float32 steps give the same losses on one device and on eight, in every mesh of the eight."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import jax
import numpy as np
import pytest
from toy_data import DUAL, IMAGES, MODEL, PAIRS, pipeline, quick_compilation, spec_of

from mllm_jax.data.pipeline import Mixture
from mllm_jax.models.params import init_params, placed_params, shardings_of
from mllm_jax.sharding.mesh import MeshConfig, make_mesh
from mllm_jax.training.config import AdamW
from mllm_jax.training.objectives.contrastive import Contrastive
from mllm_jax.training.objectives.next_token import NextToken
from mllm_jax.training.optimizer import learning_rate, make_optimizer
from mllm_jax.training.partition import split
from mllm_jax.training.step import init_state, make_train_step, place_batch, state_shardings

STEPS = 20
ADAMW = AdamW(learning_rate=2e-3, warmup_steps=4)
ONE = MeshConfig(data=1)
MESHES = {
    "data8": MeshConfig(data=8),
    "fsdp8": MeshConfig(data=1, fsdp=8),
    "tensor8": MeshConfig(data=1, tensor=8),
    "data2_fsdp2_tensor2": MeshConfig(data=2, fsdp=2, tensor=2),
    "data4_context2": MeshConfig(data=4, context=2),
}


@pytest.fixture(scope="module", autouse=True)
def _quick():
    with quick_compilation():
        yield


@dataclass(frozen=True)
class Case:
    objective: NextToken | Contrastive
    model: Any
    data: Mixture
    trainable: tuple[str, ...]


CASES = {
    "next_token": Case(NextToken(), MODEL, IMAGES, ("encoder_image/*", "projector_image/*", "llm/*")),
    "contrastive": Case(Contrastive(), DUAL, PAIRS, ("encoder_image/*", "encoder_text/*", "heads/*")),
}


@lru_cache
def first_params(name: str):
    """Returns the initial parameters of every run, on the host."""
    params, _ = init_params(CASES[name].model.make(), make_mesh(ONE, jax.devices()[:1]), seed=0)
    return jax.device_get(params)


@lru_cache
def batches(name: str) -> list[dict[str, np.ndarray]]:
    data = pipeline(CASES[name].data)
    return [data.batch(step) for step in range(STEPS)]


def on_mesh(mesh, name: str = "next_token"):
    """Places the parameters on a mesh; returns them and their shardings."""
    shardings = shardings_of(placed_params(CASES[name].model.make(), mesh))
    return jax.device_put(first_params(name), shardings), shardings


@lru_cache
def losses(name: str, mesh_config: MeshConfig, accumulate: int = 1) -> np.ndarray:
    case = CASES[name]
    mesh = make_mesh(mesh_config, jax.devices()[:1] if mesh_config == ONE else None)
    params, shardings = on_mesh(mesh, name)
    trainable, frozen = split(params, case.trainable)
    optimizer = make_optimizer(ADAMW, STEPS)
    layout = state_shardings(optimizer, trainable, split(shardings, case.trainable)[0], mesh)
    state = init_state(optimizer, trainable, layout, jax.random.key(0))
    schedule = learning_rate(ADAMW, STEPS)
    step_fn = make_train_step(
        case.model.make(), case.objective, optimizer, schedule, mesh=mesh, shardings=layout, accumulate=accumulate
    )
    found = []
    for batch in batches(name):
        shapes = spec_of(batch)
        state, metrics = step_fn(state, frozen, place_batch(batch, mesh, shapes, list(range(case.data.rows))))
        found.append(float(metrics["loss"]))
    return np.array(found)


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("mesh", MESHES)
def test_eight_devices_agree_with_one(name, mesh):
    np.testing.assert_allclose(losses(name, MESHES[mesh]), losses(name, ONE), rtol=1e-4)


@pytest.mark.parametrize("name", CASES)
def test_the_losses_that_agree_are_those_of_a_model_that_learns(name):
    found = losses(name, ONE)
    assert np.isfinite(found).all() and found[-3:].mean() < 0.9 * found[:3].mean()
    assert len(set(found.tolist())) == STEPS


@pytest.mark.parametrize("mesh", MESHES)
def test_a_mesh_splits_parameters_where_its_sizes_divide_them(mesh, devices):
    """Checks that fsdp and tensor split some parameters, but not all; data and context split none."""
    config = MESHES[mesh]
    params, _ = on_mesh(make_mesh(config))
    shares = {leaf.addressable_shards[0].data.size / leaf.size for leaf in jax.tree.leaves(params)}
    ways = {1 / (f * t) for f in (1, config.fsdp) for t in (1, config.tensor)}
    assert shares <= ways and 1.0 in shares
    assert min(shares) == 1 / (config.fsdp * config.tensor)
    kv = params["llm"]["layers"]["attention"]["k"]["kernel"]
    if config.tensor == 8:
        assert kv.addressable_shards[0].data.shape[-2] == kv.shape[-2] == 2, "8 does not divide 2 key-value heads"


# With four shards of the rows, a batch of 8 has at most two pieces.
@pytest.mark.parametrize("mesh, accumulate", [("one", 2), ("one", 4), ("data2_fsdp2_tensor2", 2)])
def test_accumulated_pieces_agree_with_the_whole_batch(mesh, accumulate):
    config = MESHES.get(mesh, ONE)
    np.testing.assert_allclose(losses("next_token", config, accumulate), losses("next_token", config), rtol=1e-5)


def test_the_pieces_have_different_weights():
    """Checks that a plain mean over the pieces would not pass."""
    learnt = [batch["loss_weights"].sum(axis=1).reshape(4, 2).sum(axis=0) for batch in batches("next_token")]
    assert sum(bool(a != b) for a, b in learnt) > STEPS / 2
