"""Training in bfloat16 on eight CPU devices, along every axis and several at once, against float32 on one."""

from __future__ import annotations

from functools import lru_cache

import jax
import numpy as np
import pytest
from toy_data import IMAGES, MODEL, pipeline, spec_of

from mllm_jax.models.params import init_params
from mllm_jax.sharding.mesh import MeshConfig, make_mesh, param_shardings
from mllm_jax.training.config import AdamW
from mllm_jax.training.objectives.next_token import NextToken
from mllm_jax.training.optimizer import learning_rate, make_optimizer
from mllm_jax.training.step import init_state, make_train_step, place_batch, state_shardings

pytestmark = pytest.mark.slow

STEPS = 8
ADAMW = AdamW(learning_rate=2e-2, warmup_steps=2)
MESHES = {
    "data8": MeshConfig(data=8),
    "fsdp8": MeshConfig(data=1, fsdp=8),
    "context8": MeshConfig(data=1, context=8),
    "tensor8": MeshConfig(data=1, tensor=8),
    "fsdp2_context2_tensor2": MeshConfig(data=1, fsdp=2, context=2, tensor=2),
}


def model(dtype: str):
    return MODEL.with_dtype(dtype).make()


@lru_cache
def first_params():
    """Returns float32 parameters on the host, the start of every run."""
    return jax.device_get(init_params(model("float32"), make_mesh(MeshConfig(data=1), jax.devices()[:1]), seed=0)[0])


@lru_cache
def batches() -> list[dict[str, np.ndarray]]:
    data = pipeline(IMAGES)
    return [data.batch(step) for step in range(STEPS)]


@lru_cache
def losses(dtype: str, config: MeshConfig, devices: int = 8) -> np.ndarray:
    module, mesh = model(dtype), make_mesh(config, jax.devices()[:devices])
    boxed = jax.eval_shape(
        lambda key: module.init(key, module.config.batch_spec().empty(), method="touch")["params"], jax.random.key(0)
    )
    shardings = param_shardings(boxed, mesh)
    optimizer = make_optimizer(ADAMW, STEPS)
    layout = state_shardings(optimizer, first_params(), shardings, mesh)
    state = init_state(optimizer, jax.device_put(first_params(), shardings), layout, jax.random.key(0))
    step_fn = make_train_step(module, NextToken(), optimizer, learning_rate(ADAMW, STEPS), mesh=mesh, shardings=layout)
    found = []
    for batch in batches():
        shapes = spec_of(batch)
        state, metrics = step_fn(state, {}, place_batch(batch, mesh, shapes, list(range(IMAGES.rows))))
        found.append(float(metrics["loss"]))
    return np.array(found)


@pytest.fixture(scope="module")
def exact() -> np.ndarray:
    return losses("float32", MeshConfig(data=1), 1)


@pytest.mark.parametrize("mesh", MESHES)
def test_bfloat16_learns_as_float32_does(mesh, exact):
    """Checks that rounding changes the losses much less than training does."""
    decrease = exact[0] - exact[-1]
    assert decrease > 1
    found = losses("bfloat16", MESHES[mesh])
    np.testing.assert_allclose(found, exact, rtol=0, atol=0.01 * decrease)
    assert (found != exact).any(), "computed in float32"
