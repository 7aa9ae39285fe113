"""Whole models on rows that are split over `context`: loss and gradients are those of one device.

One of the models has each kind of part that reads rows in its own way.
"""

from __future__ import annotations

from dataclasses import replace

import jax
import numpy as np
import pytest
from flax import linen as nn

from mllm_jax.encoders.qwen_vit import QwenViTConfig
from mllm_jax.encoders.vit import ViTConfig
from mllm_jax.llms.decoder import DecoderConfig
from mllm_jax.llms.t5 import T5Config
from mllm_jax.models.branch import Branch
from mllm_jax.models.multimodal import MultimodalConfig
from mllm_jax.projectors.mlp import MLPProjectorConfig
from mllm_jax.projectors.qformer import QFormerConfig
from mllm_jax.sharding.logical import use_mesh
from mllm_jax.sharding.mesh import MeshConfig, batch_sharding, make_mesh, param_shardings
from mllm_jax.training.objectives.next_token import NextToken
from mllm_jax.training.step import make_apply

ROWS, LENGTH, VOCAB = 2, 16, 23
VIT = ViTConfig(8, 4, 8, num_layers=1, num_heads=2, mlp_size=16)
DECODER = DecoderConfig(VOCAB, 16, 2, 4, 2, mlp_size=24)
LAYERS = ("sliding_attention", "full_attention")
MODELS = {
    "newlines, windows in some layers": MultimodalConfig(
        {"image": Branch(VIT, MLPProjectorConfig(16))},
        replace(DECODER, sliding_window=5, layer_types=LAYERS),
        newline=True,
    ),
    "packed patches, deepstack, M-RoPE": MultimodalConfig(
        {
            "image": Branch(
                QwenViTConfig(
                    hidden_size=8,
                    num_layers=2,
                    num_heads=2,
                    mlp_size=12,
                    output_size=16,
                    patch_size=2,
                    temporal_patch_size=1,
                    num_positions=16,
                    deepstack_layers=(0,),
                    full_layers=(0, 1),
                )
            )
        },
        replace(DECODER, mrope_sections=(1, 1, 0), qk_norm=True),
    ),
    "encoder-decoder, queries that read text": MultimodalConfig(
        {
            "image": Branch(
                replace(VIT, class_token=True), QFormerConfig(16, 8, 8, 2, 2, 16, num_queries=4, vocab_size=VOCAB)
            )
        },
        T5Config(VOCAB, 16, 4, 24, 1, 1, 2),
    ),
}


def batch_of(config: MultimodalConfig) -> dict[str, np.ndarray]:
    """Returns rows of two texts, which both use media tokens of both slots; the last positions are padding."""
    rng = np.random.default_rng(1)
    batch = config.batch_spec(ROWS, LENGTH, {"image": 16 if config.image.packed else 4}).empty()
    for name, x in batch.items():
        if name.endswith("tokens"):
            batch[name] = rng.integers(0, VOCAB, x.shape).astype(np.int32)
        elif name.endswith("segments"):
            batch[name] = np.repeat([[1, 2]], x[0].size // 2, axis=1).repeat(len(x), axis=0).reshape(x.shape)
    batch["segments"][:, -3:] = 0
    batch["positions"] = np.arange(LENGTH, dtype=np.int32)[None].repeat(ROWS, axis=0) % (LENGTH // 2)
    batch["media_index"][:, 2:7] = rng.integers(0, 4, (ROWS, 5))
    batch["media_index"][:, 9:12] = rng.integers(0, 4, (ROWS, 3))
    if config.newline:
        batch["media_index"][:, 4] = 4 * config.media_tokens
    if config.image.packed:
        # Four images a row, of 2 x 2 patches each.
        batch["patches"] = rng.normal(size=batch["patches"].shape).astype(np.float32)
        batch["patch_segments"] = np.arange(16, dtype=np.int32)[None].repeat(ROWS, axis=0) // 4 + 1
        batch["patch_grids"] = np.full((ROWS, 16, 2), 2, np.int32)
        batch["patch_coordinates"] = np.indices((2, 2)).reshape(2, 4).T[np.arange(16) % 4][None].repeat(ROWS, axis=0)
        batch["positions"] = np.stack([batch["positions"], batch["positions"] // 2, batch["positions"]], axis=-1)
    else:
        batch["images"] = rng.integers(0, 256, batch["images"].shape).astype(np.uint8)
    batch["loss_weights"] = np.ones((ROWS, LENGTH), np.float32)
    return batch


def loss_and_gradients(config: MultimodalConfig, mesh=None, parts=(), report=None):
    """Computes both as one program, from random parameters placed as in training."""
    model, batch = config.make(), batch_of(config)
    boxed = jax.eval_shape(lambda: model.init(jax.random.key(0), model.config.batch_spec().empty(), method="touch"))[
        "params"
    ]
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda x: 0.3 * rng.normal(size=x.shape).astype(np.float32), nn.meta.unbox(boxed))

    def loss(params, batch):
        return NextToken().loss(make_apply(model), params, batch, None)[0]

    if mesh is None:
        return jax.jit(jax.value_and_grad(loss))(params, batch)
    params = jax.device_put(params, param_shardings(boxed, mesh, parts))
    batch = {name: jax.device_put(x, batch_sharding(mesh, x.ndim, x.shape)) for name, x in batch.items()}

    def run(params, batch):
        with use_mesh(mesh, parts=parts):
            return jax.value_and_grad(loss)(params, batch)

    compiled = jax.jit(run).lower(params, batch).compile()
    if report is not None:
        report.append(compiled.as_text())
    return compiled(params, batch)


def check(config: MultimodalConfig, mesh, parts=(), report=None) -> None:
    (found, gradients), (wanted, whole) = loss_and_gradients(config, mesh, parts, report), loss_and_gradients(config)
    np.testing.assert_allclose(found, wanted, rtol=1e-5)
    largest = max(np.abs(x).max() for x in jax.tree.leaves(whole))
    assert largest > 0
    for (path, ours), theirs in zip(jax.tree.leaves_with_path(gradients), jax.tree.leaves(whole), strict=True):
        np.testing.assert_allclose(
            ours, theirs, atol=1e-5 * max(1.0, float(largest)), err_msg=jax.tree_util.keystr(path)
        )


@pytest.mark.parametrize("name", MODELS)
def test_a_model_on_split_rows_learns_the_same(name):
    check(MODELS[name], make_mesh(MeshConfig(data=1, context=4), jax.devices()[:4]))
