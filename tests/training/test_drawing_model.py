"""A model that draws: conditions of packed rows, the three kinds of stages, and what stays frozen in them."""

from __future__ import annotations

import json
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax.traverse_util import flatten_dict
from PIL import Image as Pillow
from tiny_drawing import GENERATOR, LENGTH, MAPPER, SIZE, WIDTH, Drawings, drawing_model, shade
from toy_data import MODEL, quick_compilation

from mllm_jax import AdamW, Experiment, Mixture, Stage, TokenizerConfig, Weighted
from mllm_jax.checkpoints.run import RunFolder
from mllm_jax.cli import main
from mllm_jax.data.message import Example, Image, Message, Text
from mllm_jax.data.pipeline import training_texts
from mllm_jax.data.processing.signals import signal_names
from mllm_jax.data.tokenizer import Tokenizer
from mllm_jax.errors import ConfigError
from mllm_jax.generation.assistant import Assistant
from mllm_jax.generation.conversation import Dialogue
from mllm_jax.generation.options import Options
from mllm_jax.generation.produce import Producing
from mllm_jax.generation.sampling import Sampling
from mllm_jax.layers.head import HeadInputs
from mllm_jax.llms.t5 import T5Config
from mllm_jax.models.composed_layout import composed_layout
from mllm_jax.models.generator_only import GeneratorOnlyConfig
from mllm_jax.models.params import init_params
from mllm_jax.models.processor import Processor
from mllm_jax.models.run_weights import load_run
from mllm_jax.training.loop import train
from mllm_jax.training.objectives.diffusion import Diffusion
from mllm_jax.training.objectives.output_alignment import OutputAlignment

DATA = Mixture((Weighted(Drawings()),), rows=2, length=64, slots={"image": 3, "image_targets": 5})

PAIRS = Mixture((Weighted(Drawings(reads=False)),), rows=2, length=64, slots={"image_targets": 5})


def processor(config) -> Processor:
    output = config.output("image")
    names = signal_names("image", output.projector.tokens, output.queries)
    words = Tokenizer.train(training_texts([Drawings().build()]), 320, special=names)
    return Processor(config, words, composed_layout(config, words))


def drawing(colour: str) -> Example:
    answer = (Text("here"), Image(shade(colour, 0), caption=colour))
    return Example((Message("user", f"draw {colour}"), Message("assistant", answer)))


def params_of(config, batch):
    """Returns random parameters, those that begin at zero included."""
    variables = jax.eval_shape(lambda: nn.unbox(config.make().init(jax.random.key(0), batch, method="touch")))
    rng = np.random.default_rng(0)
    leaves, tree = jax.tree.flatten(variables["params"])
    return jax.tree.unflatten(tree, [np.float32(rng.normal(0, 0.2, leaf.shape)) for leaf in leaves])


@pytest.mark.parametrize("queries", [False, True])
def test_a_condition_depends_on_its_own_answer_alone(queries):
    config = drawing_model(queries)
    ours = processor(config)
    encoded = [ours.encode(drawing(colour), 64) for colour in ("red", "green", "blue")]
    slots = {"image_targets": 4}
    packed = ours.pack([encoded[:2], encoded[2:]], 64, slots)
    alone = ours.pack([[each] for each in encoded], 64, slots)
    params = params_of(config, ours.spec(2, 64, {"image": 1} | slots).empty())
    apply = jax.jit(lambda batch: config.make().apply({"params": params}, batch, method="conditions")["image"])
    together, apart = apply(packed), apply(alone)
    assert together.shape == (2, 4, LENGTH, WIDTH)
    np.testing.assert_allclose([together[0, 0], together[0, 1], together[1, 0]], apart[:, 0], atol=2e-5, rtol=2e-5)
    assert np.abs(apart[0, 0] - apart[1, 0]).max() > 1e-3, "another prompt has another condition"
    # It is the projector's output for the hidden states at the signals.
    head = config.make().apply({"params": params}, alone, method="head_inputs")
    assert isinstance(head, HeadInputs)
    at = alone["image_signals"][:, 0]
    states = np.take_along_axis(np.asarray(head.x), at[..., None], axis=1)
    table = params["llm"]["token_embedding"]["embedding"]
    embeddings = table[np.take_along_axis(alone["tokens"], at, axis=1)]
    projector = config.output("image").projector.make()
    made = projector.apply({"params": params["output_projector_image"]}, states, embeddings)
    np.testing.assert_allclose(made, apart[:, 0], atol=2e-5, rtol=2e-5)


def test_the_error_of_diffusion_is_that_of_the_scheduler_and_drops_conditions():
    config = GeneratorOnlyConfig(drawing_model())
    ours = processor(config.model)
    batch = ours.of_composition(config).pack([[ours.encode(drawing("red"), 64)]], 64, {"image_targets": 2})
    params = params_of(config, batch)

    def apply(params, batch, method=None):
        return config.make().apply({"params": params}, batch, method=method)

    loss, metrics = jax.jit(lambda key: Diffusion(drop=0.0).loss(apply, params, batch, key))(jax.random.key(3))
    keys = jax.random.split(jax.random.fold_in(jax.random.key(3), 0), 3)
    latents = 2 * batch["image_targets"][0, 0] / 255.0 - 1
    noise = jax.random.normal(keys[0], (1, 2, SIZE, SIZE, 3))[0, 0]
    level = jax.random.uniform(keys[1], (1, 2))[0, 0]
    scheduler = GENERATOR.scheduler
    time = jnp.int32(level * scheduler.num_train_timesteps)
    share = scheduler.alphas_cumprod[time]
    noised = np.sqrt(share) * latents + np.sqrt(1 - share) * noise
    generator = config.model.output("image").generator.make()
    of = {"params": params["generator_image"]}
    condition = generator.apply(of, batch["image_captions"][:, 0], method="condition")
    output = generator.apply(of, noised[None], time[None], condition, method="denoise")
    np.testing.assert_allclose(loss, np.square(output[0] - noise).mean(), rtol=1e-4)
    assert metrics["weight"] == 1, "an empty slot does not count"
    dropped = jax.jit(lambda key: Diffusion(drop=0.99999).loss(apply, params, batch, key))(jax.random.key(3))[0]
    condition = generator.apply(of, batch["image_empty"], method="condition")
    output = generator.apply(of, noised[None], time[None], condition, method="denoise")
    np.testing.assert_allclose(dropped, np.square(output[0] - noise).mean(), rtol=1e-4)
    assert abs(float(dropped - loss)) > 1e-6


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Trains a generator alone, then aligns, then trains all of the way through the frozen generator."""
    base, model = tmp_path_factory.mktemp("drawing"), drawing_model()
    stages = (
        Stage("generator", Diffusion(), ("generator_image/unet/*",), PAIRS, 6, model=GeneratorOnlyConfig()),
        Stage("align", OutputAlignment(), ("output_projector_*", "llm/*"), DATA, 4),
        Stage("draw", Diffusion(min_snr=5.0), ("output_projector_*", "llm/*"), DATA, 4, AdamW(warmup_steps=0)),
    )
    experiment = Experiment(
        name="drawing",
        model=model,
        tokenizer=TokenizerConfig(vocab_size=320),
        stages=tuple(replace(stage, optimizer=AdamW(learning_rate=3e-3, warmup_steps=0)) for stage in stages),
        log_every=1,
    )
    with quick_compilation():
        train(experiment, base / "run", devices=jax.devices()[:2])
    return base / "run", experiment


def flat(params) -> dict[str, np.ndarray]:
    return flatten_dict(jax.tree.map(np.asarray, params), sep="/")


def test_each_stage_reports_its_losses_and_they_fall(run):
    lines = [json.loads(line) for line in (run[0] / "metrics.jsonl").read_text().splitlines()]
    losses = [line for line in lines if "loss" in line]
    names = ("generator", "align", "draw")
    found = {name: [line for line in losses if line["stage"].endswith(name)] for name in names}
    assert [len(found[name]) for name in names] == [6, 4, 4]
    assert all(np.isfinite(line["diffusion_loss"]) for name in ("generator", "draw") for line in found[name])
    assert "token_loss" in found["draw"][0] and "token_loss" not in found["generator"][0]
    assert found["align"][-1]["condition_distance"] < found["align"][0]["condition_distance"]


def test_the_text_encoder_stays_and_what_is_trained_changes(run):
    folder, experiment = run
    _, model, params, _, mesh = load_run(RunFolder(folder))
    trained, first = flat(params), flat(init_params(model, mesh, experiment.seed)[0])
    same = {path for path in first if np.array_equal(first[path], trained[path])}
    assert all(path in same for path in first if path.startswith("generator_image/text_encoder/"))
    assert not any(path.startswith("generator_image/unet/") and "kernel" in path for path in same)
    assert not any(path.startswith("output_projector_image/") and path.endswith("kernel") for path in same)


def test_the_path_of_an_image_stands_in_the_answer(run, tmp_path, capsys):
    asked = ["generate", str(run[0]), "draw red", "--produce", "image", "--steps", "2", "--max-new-tokens", "2"]
    assert main([*asked, "--out", str(tmp_path / "new"), "--guidance", "1"]) == 0
    path = tmp_path / "new" / "draw-red-0.png"
    assert str(path) in capsys.readouterr().out
    image = Pillow.open(path)
    assert image.size == (SIZE, SIZE) and image.text["steps"] == "2" and "draw red" in image.text["prompt"]


def test_a_conversation_holds_what_the_model_drew(run):
    assistant = Assistant.load(run[0], by_layer=False)
    producing = Producing(("image",), drawing=dict(steps=1, guidance_scale=1.0))
    dialogue = Dialogue(assistant, Options(2), Sampling(), producing=producing)
    pieces = list(dialogue.ask("draw red"))
    drawn = [piece for piece in pieces if not isinstance(piece, str)]
    assert drawn and dialogue.answer.media == tuple(drawn)
    said = [part for part in dialogue.turns[-1].parts if isinstance(part, Image)]
    assert len(said) == len(drawn)
    np.testing.assert_array_equal(said[0].source, (255 * drawn[0].array).round().astype(np.uint8))
    assert list(dialogue.ask("again")), "the next turn reads it"


def test_outputs_that_no_model_can_have_are_refused():
    model = drawing_model()
    with pytest.raises(ConfigError, match="'video'.* with a TextToImageConfig"):
        replace(model, outputs={"video": model.outputs["image"]})
    with pytest.raises(ConfigError, match="encoder-decoder"):
        replace(model, llm=T5Config(vocab_size=320, hidden_size=32, num_layers=1, num_heads=2))


def test_stages_that_cannot_learn_to_draw_are_refused():
    model = drawing_model()
    without = replace(DATA, slots={"image": 3})
    for stage, message in (
        (dict(objective=Diffusion(), data=without), "slots for media of answers"),
        (dict(objective=Diffusion(), model=GeneratorOnlyConfig()), r"slots \['image'\] for generators alone"),
        (dict(objective=OutputAlignment(), trainable=("generator_image/*",)), "a frozen generator_image"),
    ):
        how = dict(name="s", trainable=("llm/*",), data=DATA, steps=1) | stage
        with pytest.raises(ConfigError, match=message):
            Experiment(name="e", model=model, stages=(Stage(**how),))
    with pytest.raises(ConfigError, match="no media"):
        how = dict(name="s", trainable=("llm/*",), data=DATA, steps=1, objective=Diffusion())
        Experiment(name="e", model=MODEL, stages=(Stage(**how),))
    with pytest.raises(ConfigError, match="generator's condition: 6 vectors of width 16"):
        drawing = model.outputs["image"]
        replace(model, outputs={"image": replace(drawing, projector=replace(MAPPER, output_tokens=5))})
