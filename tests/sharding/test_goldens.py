"""Golden shardings of the whole train state, one JSON per mesh.

A change of the table, of a model's logical names or of the optimizer appears here as a diff. If it is intended:
`UPDATE_GOLDENS=1 pytest tests/sharding/test_goldens.py`, then read the diff of goldens/.
"""

from __future__ import annotations

import json
import os
from pathlib import Path

import jax
import numpy as np
import optax
import pytest
from flax import linen as nn

from mllm_jax.encoders.text_encoder import TextTowerConfig
from mllm_jax.encoders.vit import ViTConfig
from mllm_jax.llms.decoder import DecoderConfig, DecoderDialect
from mllm_jax.models.branch import Branch
from mllm_jax.models.clip import DualEncoderConfig
from mllm_jax.models.multimodal import MultimodalConfig
from mllm_jax.models.params import placed_together, shardings_of
from mllm_jax.projectors.mlp import MLPProjectorConfig
from mllm_jax.sharding.mesh import MeshConfig, make_mesh, param_shardings
from mllm_jax.training.config import AdamW
from mllm_jax.training.objectives.next_token import NextToken
from mllm_jax.training.optimizer import learning_rate, make_optimizer
from mllm_jax.training.step import TrainState, init_state, make_train_step, place_batch, state_shardings

GOLDENS = Path(__file__).parent / "goldens"
MESHES = {
    "data8": MeshConfig(data=8),
    "fsdp8": MeshConfig(data=1, fsdp=8),
    "tensor8": MeshConfig(data=1, tensor=8),
    "data2_fsdp2_tensor2": MeshConfig(data=2, fsdp=2, tensor=2),
}
# Some sizes are divisible by 8, some only by 2, some by neither: 2 key-value heads, 3 heads, a vocabulary of 30.
CONFIG = MultimodalConfig(
    inputs={
        "image": Branch(
            ViTConfig(16, 8, 24, num_layers=2, num_heads=3, mlp_size=32, stem_channels=(8,), class_token=True),
            MLPProjectorConfig(output_size=16, hidden_size=20, input_norm=True),
        )
    },
    llm=DecoderConfig(
        vocab_size=30,
        hidden_size=16,
        num_layers=2,
        num_heads=8,
        num_kv_heads=2,
        head_dim=4,
        mlp_size=40,
        tie_word_embeddings=False,
        dialect=DecoderDialect(qkv_bias=True),
        qk_norm=True,
    ),
)
WORDS = TextTowerConfig(vocab_size=32, max_length=16, hidden_size=12, num_layers=1, num_heads=3, mlp_size=24)
DUAL = DualEncoderConfig(CONFIG.image.encoder, WORDS, projection_size=8, kind="sigmoid")
OPTIMIZER = make_optimizer(AdamW(), 10)


def by_path(tree) -> dict:
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in jax.tree.leaves_with_path(tree)
    }


def abstract_state(mesh) -> tuple[TrainState, TrainState]:
    """Returns (shapes, shardings) of the train state with every parameter trainable; nothing is computed."""
    params = placed_together((CONFIG, DUAL), mesh)
    shardings = state_shardings(OPTIMIZER, params, shardings_of(params), mesh)
    scalar = jax.ShapeDtypeStruct((), np.int32)
    key = jax.ShapeDtypeStruct((2,), np.uint32)
    return TrainState(scalar, params, jax.eval_shape(OPTIMIZER.init, params), key), shardings


@pytest.mark.parametrize("name", MESHES)
def test_shardings_of_the_train_state(name):
    shapes, shardings = map(by_path, abstract_state(make_mesh(MESHES[name])))
    assert shapes.keys() == shardings.keys(), "a leaf without a sharding"
    found = {
        path: {"shape": list(shapes[path].shape), "spec": [list(a) if isinstance(a, tuple) else a for a in s.spec]}
        for path, s in shardings.items()
    }
    file = GOLDENS / f"{name}.json"
    if os.environ.get("UPDATE_GOLDENS"):
        lines = ",\n".join(f"  {json.dumps(path)}: {json.dumps(leaf)}" for path, leaf in sorted(found.items()))
        file.write_text("{\n" + lines + "\n}\n")
    assert file.is_file(), f"{file.name} is missing: run once with UPDATE_GOLDENS=1"
    golden = json.loads(file.read_text())
    changed = {
        path: (golden.get(path, "absent"), found.get(path, "absent"))
        for path in golden.keys() | found.keys()
        if golden.get(path) != found.get(path)
    }
    assert not changed, "path: (golden, now)\n" + "\n".join(f"{path}: {pair}" for path, pair in sorted(changed.items()))


@pytest.mark.parametrize("name", MESHES)
def test_moments_lie_where_their_parameters_lie(name):
    _, shardings = abstract_state(make_mesh(MESHES[name]))
    params = by_path(shardings.params)
    (adam,) = [s for s in jax.tree.leaves(shardings.opt_state, is_leaf=is_adam) if is_adam(s)]
    for moments in (adam.mu, adam.nu):
        assert by_path(moments) == params


def is_adam(node) -> bool:
    return isinstance(node, optax.ScaleByAdamState)


def test_a_compiled_step_keeps_them_and_does_not_compile_twice():
    """Checks two steps on different batches: every leaf has its sharding, and one program serves both."""
    mesh = make_mesh(MESHES["data2_fsdp2_tensor2"])
    # A smaller model, and parameters without a compiled init: the step alone takes seconds to compile.
    small = ViTConfig(8, 4, 8, num_layers=1, num_heads=2, mlp_size=16)
    model = MultimodalConfig(
        {"image": Branch(small, MLPProjectorConfig(output_size=16))},
        DecoderConfig(vocab_size=30, hidden_size=16, num_layers=1, num_heads=4, num_kv_heads=2, mlp_size=32),
    ).make()
    boxed = jax.eval_shape(lambda: model.init(jax.random.key(0), model.config.batch_spec().empty(), method="touch"))[
        "params"
    ]
    shardings = param_shardings(boxed, mesh)
    rng = np.random.default_rng(0)
    params = jax.tree.map(
        lambda x, sharding: jax.device_put(0.1 * rng.normal(size=x.shape).astype(np.float32), sharding),
        nn.meta.unbox(boxed),
        shardings,
    )
    shardings = state_shardings(OPTIMIZER, params, shardings, mesh)
    state = init_state(OPTIMIZER, params, shardings, jax.random.key(0))
    step = make_train_step(model, NextToken(), OPTIMIZER, learning_rate(AdamW(), 10), mesh=mesh, shardings=shardings)
    wanted = by_path(shardings)
    before = np.asarray(params["llm"]["token_embedding"]["embedding"])
    for _ in range(2):
        batch = {
            name: np.asarray(x)
            for name, x in model.config.batch_spec(rows=4, length=8, slots={"image": 1}).empty().items()
        }
        batch["tokens"] = rng.integers(0, 30, (4, 8)).astype(np.int32)
        batch["segments"] = np.ones((4, 8), np.int32)
        batch["loss_weights"] = np.ones((4, 8), np.float32)
        placed = place_batch(batch, mesh, model.config.batch_spec(rows=4, length=8, slots={"image": 1}), list(range(4)))
        state, metrics = step(state, {}, placed)
        for path, leaf in by_path(state).items():
            assert leaf.sharding.is_equivalent_to(wanted[path], leaf.ndim), path
    assert step._cache_size() == 1
    assert int(state.step) == 2 and np.isfinite(float(metrics["loss"])) and float(metrics["nonfinite"]) == 0
    assert np.abs(np.asarray(state.params["llm"]["token_embedding"]["embedding"]) - before).max() > 0
