"""A dual encoder from its config to vectors in a file, on eight devices: trained, evaluated, used."""

from __future__ import annotations

import json
from dataclasses import replace

import jax
import numpy as np
import pytest
from PIL import Image
from toy_data import quick_compilation

from mllm_jax import cli
from mllm_jax.checkpoints.fields import change_fields
from mllm_jax.data.images import as_image
from mllm_jax.data.pipeline import Mixture, Pipeline, Weighted
from mllm_jax.datasets.openmoji import OpenMojiCaptions
from mllm_jax.encoders.text_encoder import TextTowerConfig
from mllm_jax.encoders.vit import ViTConfig
from mllm_jax.errors import ConfigError
from mllm_jax.evaluation.run import evaluate_run
from mllm_jax.evaluation.tasks.openmoji import openmoji_retrieval
from mllm_jax.generation.embed import Embedder
from mllm_jax.models.clip import DualEncoderConfig
from mllm_jax.models.run_weights import load_run
from mllm_jax.sharding.mesh import MeshConfig
from mllm_jax.training.config import AdamW, Experiment, Stage, TokenizerConfig
from mllm_jax.training.loop import train
from mllm_jax.training.objectives.contrastive import Contrastive

SIZE, STEPS = 16, 72
VISION = ViTConfig(image_size=SIZE, patch_size=4, hidden_size=32, num_layers=1, num_heads=2, mlp_size=48)
TEXT = TextTowerConfig(vocab_size=400, max_length=48, hidden_size=32, num_layers=1, num_heads=2, mlp_size=48)
# Softmax with a causal text encoder that pools the last token, sigmoid with a bidirectional one that pools the mean.
MODELS = {
    "softmax": DualEncoderConfig(
        VISION, change_fields(TEXT, mask="causal", pooling="eos", eos_token_id=2), 24, pooling="patches"
    ),
    "sigmoid": DualEncoderConfig(VISION, change_fields(TEXT, head_size=32), None, "sigmoid"),
}


def experiment(kind: str) -> Experiment:
    captions = OpenMojiCaptions(image_size=SIZE, variants=1, augment=True)
    mixture = Mixture((Weighted(captions),), rows=32, length=48, slots={"image": 1}, layout="caption", group=4)
    stage = Stage(
        "contrastive",
        Contrastive(kind=kind),
        ("*",),
        mixture,
        steps=STEPS,
        optimizer=AdamW(learning_rate=3e-3, warmup_steps=2),
        validation=replace(mixture, sources=(Weighted(replace(captions, split="validation", variants=8)),)),
        validate_every=24,
        validation_batches=1,
    )
    return Experiment(
        name=kind,
        model=MODELS[kind],
        stages=(stage,),
        tokenizer=TokenizerConfig(vocab_size=400),
        mesh=MeshConfig(data=2, fsdp=2, tensor=2),
        log_every=1,
        evaluation=openmoji_retrieval(splits=("validation", "composition"), image_size=SIZE, ways=120),
    )


@pytest.fixture(scope="module", params=MODELS)
def run(request, tmp_path_factory):
    """Trains a run; returns (kind, the run's folder)."""
    with quick_compilation():
        folder = tmp_path_factory.mktemp("dual") / request.param
        train(experiment(request.param), folder)
        yield request.param, folder


def test_the_loss_falls_and_the_split_is_found_better_than_by_chance(run):
    kind, folder = run
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    losses = [line["loss"] for line in lines if "loss" in line]
    assert len(losses) == STEPS and np.mean(losses[-3:]) < 0.9 * np.mean(losses[:2])
    scored = evaluate_run(folder)
    ways = ("image_to_text", "text_to_image")
    assert list(scored) == [f"{split}/{way}" for split in ("validation", "composition") for way in ways]
    for score in scored.values():
        assert score["ways"] == 120 and score["accuracy"] <= score["recall_at_5"] <= score["recall_at_10"]
    assert np.mean([scored[f"composition/{way}"]["recall_at_10"] for way in ways]) > 1.5 * 10 / 120
    assert (folder / "report.html").is_file() and (folder / "results.json").is_file()


def test_a_run_embeds_what_training_embeds(run, tmp_path):
    """Checks that vectors equal those of the training batch, with other rows, other padding and one text at a time."""
    _, folder = run
    made, model, params, processor, _ = load_run(folder_of(folder))
    mixture = replace(made.stages[0].data, sources=(Weighted(OpenMojiCaptions(image_size=SIZE, variants=1)),))
    data = Pipeline(mixture, processor, seed=0)
    source = data.sources[0]
    index = [i for row in data.plan.step(0) for _, i in row][:5]
    image, text, *_ = jax.jit(lambda p, b: model.apply({"params": p}, b, method="embed_pairs"))(params, data.batch(0))
    embedder = Embedder.trained(model, params, processor.tokenizer, batch_size=2)
    examples = [source.example(i) for i in index]
    captions = [next(m.text for m in example.messages if m.role == "assistant") for example in examples]
    images = [as_image(example.media[0].source) for example in examples]
    assert len({len(processor.tokenizer.encode(caption)) for caption in captions}) > 1, "texts of several lengths"
    np.testing.assert_allclose(embedder.texts(captions), text[:5, 0], atol=2e-5)
    np.testing.assert_allclose(embedder.image_vectors(images), image[:5, 0], atol=2e-5)
    paths = []
    for number, pixels in enumerate(images):
        paths.append(tmp_path / f"{number}.png")
        Image.fromarray(pixels).save(paths[-1])
    out = tmp_path / "vectors.npz"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("mllm_jax.cli.embed.use_cpu_devices", lambda experiment: None)
        command = ["embed", str(folder), "--out", str(out), "--images", *map(str, paths), "--text", *captions]
        assert cli.main(command) == 0
    with np.load(out) as stored:
        np.testing.assert_allclose(stored["image_embeds"], image[:5, 0], atol=2e-5)
        np.testing.assert_allclose(stored["text_embeds"], text[:5, 0], atol=2e-5)


def test_what_a_run_of_a_dual_encoder_is_not_for(run, tmp_path, capsys):
    _, folder = run
    assert cli.main(["generate", str(folder), "What is this?"]) == 2
    assert "a model that generates text" in capsys.readouterr().err
    arguments = ["--out", str(tmp_path / "x.npz"), "--text", "a cat", "--dtype", "bfloat16"]
    assert cli.main(["embed", str(folder), *arguments]) == 2
    assert "--dtype bfloat16 for a run" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_only_a_dual_encoder_is_embedded():
    from toy_data import MODEL

    with pytest.raises(ConfigError, match="a run of a Multimodal"):
        Embedder.trained(MODEL.make(), {}, None)


def folder_of(path):
    from mllm_jax.checkpoints.run import RunFolder

    return RunFolder(path)
