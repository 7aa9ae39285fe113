"""BLIP-2's first stage as a run on eight devices, and its Q-Former in the second stage's model."""

from __future__ import annotations

import json
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from toy_data import MODEL, PAIRS, Toy

from mllm_jax.checkpoints.run import RunFolder
from mllm_jax.data.pipeline import Mixture, Weighted
from mllm_jax.datasets.openmoji import OpenMojiCaptions
from mllm_jax.encoders.vit import ViTConfig
from mllm_jax.errors import ConfigError
from mllm_jax.models.blip2_stage1 import QFormerPretrainingConfig
from mllm_jax.models.branch import Branch
from mllm_jax.models.multimodal import Connection, MultimodalConfig
from mllm_jax.models.run_weights import load_run
from mllm_jax.projectors.qformer import QFormerConfig
from mllm_jax.sharding.logical import use_mesh
from mllm_jax.sharding.mesh import MeshConfig, make_mesh
from mllm_jax.training.config import AdamW, Experiment, Pretrained, Stage, TokenizerConfig
from mllm_jax.training.loop import train
from mllm_jax.training.objectives.contrastive import Contrastive
from mllm_jax.training.objectives.next_token import NextToken
from mllm_jax.training.objectives.qformer import QFormerStage1
from mllm_jax.training.pretrained import initial_params
from mllm_jax.training.step import make_apply

STEPS = 20
ENCODER = ViTConfig(16, 8, 16, num_layers=1, num_heads=2, mlp_size=24, class_token=True)
QFORMER = QFormerConfig(
    32,
    16,
    hidden_size=32,
    num_layers=1,
    num_heads=4,
    mlp_size=32,
    num_queries=3,
    cross_attention_frequency=1,
    vocab_size=400,
    max_length=48,
)
MODEL_1 = QFormerPretrainingConfig(ENCODER, QFORMER, projection_size=16)
CAPTIONS = OpenMojiCaptions(image_size=16, variants=1)
DATA = Mixture((Weighted(CAPTIONS),), rows=8, length=48, slots={"image": 1}, layout="caption")


def stage(**changes) -> Stage:
    trainable = ("projector_image/*", "*_projection/*", "matching/*", "caption*", "temperature")
    made = Stage(
        "represent",
        QFormerStage1(equal_texts=True),
        trainable,
        DATA,
        steps=STEPS,
        optimizer=AdamW(learning_rate=1e-2, warmup_steps=2),
    )
    return replace(made, **changes)


def experiment(**changes) -> Experiment:
    made = Experiment(
        name="stage 1",
        model=MODEL_1,
        stages=(stage(),),
        tokenizer=TokenizerConfig(vocab_size=400),
        mesh=MeshConfig(data=8),
        log_every=1,
    )
    return replace(made, **changes)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("stage1") / "run"
    train(experiment(), folder)
    return folder


def test_the_losses_fall(run):
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    lines = [line for line in lines if "loss" in line]
    assert len(lines) == STEPS
    for name in ("loss", "loss_itg"):
        values = [line[name] for line in lines]
        assert np.mean(values[-3:]) < 0.9 * np.mean(values[:2]), name
    for line in lines:
        assert line["loss"] == pytest.approx(sum(line[f"loss_{part}"] for part in ("itc", "itm", "itg")), rel=1e-4)
        assert 0 <= line["recall_at_1"] <= 1 and 0 <= line["matching_accuracy"] <= 1
    assert lines[-1]["temperature"] != lines[0]["temperature"]


def test_the_second_stage_begins_with_its_qformer(run):
    model = MultimodalConfig(
        {"image": Branch(ENCODER, QFORMER, Connection(class_token=True))}, replace(MODEL.llm, vocab_size=400)
    )
    source = Pretrained("projector_image", str(run), stage="represent")
    mixture = Mixture((Weighted(Toy()),), rows=4, length=32, slots={"image": 1})
    align = Stage("align", NextToken(), ("projector_image/*",), mixture, steps=1)
    second = experiment(model=model, stages=(align,), pretrained=(source,))
    mesh = make_mesh(second.mesh)
    params, _ = initial_params(second, mesh)
    _, _, trained, _, _ = load_run(RunFolder(run))
    assert jax.tree.all(
        jax.tree.map(lambda a, b: bool((a == b).all()), params["projector_image"], trained["projector_image"])
    )


def test_the_loss_is_the_same_on_any_mesh(run):
    """Checks that negatives come from the whole batch, on any device."""
    _, model, params, _, _ = load_run(RunFolder(run))
    rng = np.random.default_rng(0)
    batch = dict(
        tokens=jnp.asarray(rng.integers(4, 320, (8, 12)), jnp.int32),
        segments=jnp.asarray(np.arange(12)[None] < rng.integers(3, 13, (8, 1)), jnp.int32),
        images=jnp.asarray(rng.integers(0, 256, (8, 1, 16, 16, 3)), jnp.uint8),
    )
    params = jax.device_get(params)

    def loss(params, batch):
        return QFormerStage1().loss(make_apply(model), params, batch, jax.random.key(3))[0]

    alone = jax.jit(loss)(params, batch)
    mesh = make_mesh(MeshConfig(data=2, fsdp=4))
    with use_mesh(mesh):
        rows = jax.NamedSharding(mesh, jax.P(("data", "fsdp")))
        spread = jax.jit(loss)(params, jax.device_put(batch, rows))
    assert spread == pytest.approx(float(alone), rel=1e-5)


def test_equal_texts_belong_together():
    """Checks four pairs, two with the same text: neither is the other's negative, and both count as correct."""
    objective = QFormerStage1(equal_texts=True, label_smoothing=0.0)
    tokens = jnp.asarray([[1, 5, 6, 0], [1, 7, 0, 0], [1, 5, 6, 9], [1, 7, 8, 0]], jnp.int32)
    segments = jnp.asarray([[1, 1, 1, 0], [1, 1, 0, 0], [1, 1, 1, 0], [1, 1, 1, 0]], jnp.int32)
    same, shares = objective._same(dict(tokens=tokens, segments=segments))
    assert same.astype(int).tolist() == [[1, 0, 1, 0], [0, 1, 0, 0], [1, 0, 1, 0], [0, 0, 0, 1]]
    assert shares[0].tolist() == [0.5, 0, 0.5, 0] and shares[1].tolist() == [0, 1, 0, 0]


def test_what_does_not_fit_is_refused():
    with pytest.raises(ConfigError, match="NextToken for a QFormerPretrainingConfig"):
        experiment(stages=(stage(objective=NextToken()),))
    with pytest.raises(ConfigError, match="Contrastive for a QFormerPretrainingConfig"):
        experiment(stages=(stage(objective=Contrastive()),))
    with pytest.raises(ConfigError, match="QFormerStage1 for a MultimodalConfig"):
        experiment(model=MODEL, tokenizer=TokenizerConfig(vocab_size=320))
    with pytest.raises(ConfigError, match="up to 2 captions an image for heads of 1"):
        experiment(stages=(stage(data=PAIRS),))
    with pytest.raises(ConfigError, match="60 positions for a text encoder of 48"):
        experiment(stages=(stage(data=replace(DATA, length=60)),))
    with pytest.raises(ConfigError, match="on one row"):
        QFormerStage1().loss(None, {}, dict(tokens=jnp.zeros((1, 4), int)), None)
