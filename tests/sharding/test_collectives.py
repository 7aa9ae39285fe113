"""Counts of the collectives in the compiled train step of a small multimodal model, by jax, mesh and kind, as JSON.

A new or a missing collective changes the cost of training on a pod. If it is intended, or for another jax:
`UPDATE_GOLDENS=1 pytest -n 0 tests/sharding/test_collectives.py`, then read the diff of goldens/collectives.json. Run
it under every jax that is stored there.
"""

from __future__ import annotations

import json
import os
import re
from collections import Counter
from functools import partial
from pathlib import Path

import jax
import numpy as np
import pytest
from flax import linen as nn

from mllm_jax.encoders.vit import ViTConfig
from mllm_jax.llms.decoder import DecoderConfig
from mllm_jax.models.branch import Branch
from mllm_jax.models.multimodal import MultimodalConfig
from mllm_jax.projectors.mlp import MLPProjectorConfig
from mllm_jax.sharding.logical import data_parallel, use_mesh
from mllm_jax.sharding.mesh import MeshConfig, batch_sharding, make_mesh, param_shardings
from mllm_jax.training.config import AdamW
from mllm_jax.training.objectives.next_token import NextToken
from mllm_jax.training.optimizer import learning_rate, make_optimizer
from mllm_jax.training.step import TrainState, make_train_step, state_shardings

GOLDEN = Path(__file__).parent / "goldens" / "collectives.json"
MESHES = {
    "fsdp8": MeshConfig(data=1, fsdp=8),
    "tensor8": MeshConfig(data=1, tensor=8),
    "data2_context4": MeshConfig(data=2, context=4),
    "data2_fsdp2_tensor2": MeshConfig(data=2, fsdp=2, tensor=2),
}
KINDS = ("all-gather", "all-reduce", "all-to-all", "collective-permute", "reduce-scatter")
ROWS, LENGTH, SLOTS = 8, 16, 4
MODEL = MultimodalConfig(
    inputs={
        "image": Branch(ViTConfig(8, 4, 16, num_layers=2, num_heads=8, mlp_size=32), MLPProjectorConfig(output_size=16))
    },
    llm=DecoderConfig(vocab_size=64, hidden_size=16, num_layers=2, num_heads=8, num_kv_heads=8, mlp_size=32),
)


def boxed_params():
    model = MODEL.make()
    return jax.eval_shape(lambda: model.init(jax.random.key(0), model.config.batch_spec().empty(), method="touch"))[
        "params"
    ]


def placed(tree, shardings):
    return jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), tree, shardings)


def abstract_batch(mesh):
    batch = MODEL.batch_spec(ROWS, LENGTH, {"image": SLOTS}).empty()
    batch["loss_weights"] = np.zeros((ROWS, LENGTH), np.float32)
    return placed(batch, {name: batch_sharding(mesh, x.ndim, x.shape) for name, x in batch.items()})


def compiled_step(mesh) -> str:
    """Returns the HLO of the step with every parameter trainable; nothing is computed."""
    boxed, optimizer = boxed_params(), make_optimizer(AdamW(), 10)
    params = nn.meta.unbox(boxed)
    layout = state_shardings(optimizer, params, param_shardings(boxed, mesh), mesh)
    scalar, key = jax.ShapeDtypeStruct((), np.int32), jax.ShapeDtypeStruct((2,), np.uint32)
    state = placed(TrainState(scalar, params, jax.eval_shape(optimizer.init, params), key), layout)
    step = make_train_step(
        MODEL.make(), NextToken(), optimizer, learning_rate(AdamW(), 10), mesh=mesh, shardings=layout
    )
    return step.lower(state, {}, abstract_batch(mesh)).compile().as_text()


def count(text: str) -> dict[str, int]:
    """Counts instructions by kind; one in a loop's body counts once."""
    found = Counter(re.findall(rf"\s({'|'.join(KINDS)})(?:-start)?\(", text))
    return {kind: found[kind] for kind in KINDS}


@pytest.mark.parametrize("name", MESHES)
def test_collectives_of_a_step(name):
    found = count(compiled_step(make_mesh(MESHES[name])))
    stored = json.loads(GOLDEN.read_text()) if GOLDEN.is_file() else {}
    if os.environ.get("UPDATE_GOLDENS"):
        stored.setdefault(jax.__version__, {})[name] = found
        GOLDEN.write_text(json.dumps(stored, indent=1, sort_keys=True) + "\n")
    goldens = {version: steps[name] for version, steps in stored.items() if name in steps}
    assert goldens, f"{name} is missing: run once with UPDATE_GOLDENS=1"
    if jax.__version__ in goldens:
        assert found == goldens[jax.__version__]
    for golden in goldens.values():  # another compiler merges differently, but uses no other kinds
        assert {kind for kind in KINDS if found[kind]} == {kind for kind in KINDS if golden[kind]}


def test_on_split_rows_nothing_is_gathered():
    """Checks that neither keys nor images nor media are gathered: data x context has rings and sums of gradients."""
    for steps in json.loads(GOLDEN.read_text()).values():
        golden = steps["data2_context4"]
        assert golden["all-gather"] == golden["all-to-all"] == 0 < golden["collective-permute"]


def encoded(mesh, parts):
    """Returns (HLO of the forward pass of encoder and projector, its media tokens)."""
    boxed, model = boxed_params(), MODEL.make()
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda x: 0.3 * rng.normal(size=x.shape).astype(np.float32), nn.meta.unbox(boxed))
    images = rng.integers(0, 256, (ROWS, SLOTS, 8, 8, 3)).astype(np.uint8)

    def run(params, images):
        with use_mesh(mesh, parts=parts):
            return model.apply({"params": params}, {"images": images}, method="encode_media").tokens

    params = jax.device_put(params, param_shardings(boxed, mesh, parts))
    images = jax.device_put(images, batch_sharding(mesh, images.ndim, images.shape))
    compiled = jax.jit(run).lower(params, images).compile()
    return compiled.as_text(), np.asarray(compiled(params, images))


def test_a_data_parallel_encoder_exchanges_nothing_beside_a_tensor_parallel_llm():
    tensor, tower = (encoded(make_mesh(MESHES["tensor8"]), parts) for parts in ((), (data_parallel("encoder_image"),)))
    np.testing.assert_allclose(tensor[1], tower[1], atol=1e-5)
    inside = partial(re.findall, rf"(?:{'|'.join(KINDS)})(?:-start)?\(.*op_name=\"[^\"]*/encoder_image/")
    assert inside(tensor[0]) and not inside(tower[0])
