"""A P-Former trained against a trained LLM, and a Q-Former guided by it: three runs, each on parts of those before."""

from __future__ import annotations

import json
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict

from mllm_jax.checkpoints.run import RunFolder
from mllm_jax.data.pipeline import Mixture, Pipeline, Weighted
from mllm_jax.datasets.openmoji import OpenMojiCaptions
from mllm_jax.datasets.text_only import TextOnly
from mllm_jax.encoders.vit import ViTConfig
from mllm_jax.errors import ConfigError
from mllm_jax.llms.decoder import DecoderConfig
from mllm_jax.models.branch import Branch
from mllm_jax.models.multimodal import MultimodalConfig
from mllm_jax.models.pformer_pretraining import PFormerPretrainingConfig
from mllm_jax.models.prompt_guided import PromptGuidedConfig
from mllm_jax.models.run_weights import load_run
from mllm_jax.projectors.pformer import PFormerConfig
from mllm_jax.projectors.qformer import QFormerConfig
from mllm_jax.sharding.logical import use_mesh
from mllm_jax.sharding.mesh import MeshConfig, make_mesh
from mllm_jax.training.config import AdamW, Experiment, Pretrained, Stage, TokenizerConfig
from mllm_jax.training.loop import train
from mllm_jax.training.objectives.contrastive import Contrastive
from mllm_jax.training.objectives.next_token import NextToken
from mllm_jax.training.objectives.pformer_losses import PFormerObjective, PromptGuided
from mllm_jax.training.pretrained import initial_params
from mllm_jax.training.step import make_apply

STEPS = 24
VOCABULARY = 400
ENCODER = ViTConfig(16, 8, 16, num_layers=1, num_heads=2, mlp_size=24)
LLM = DecoderConfig(VOCABULARY, hidden_size=32, num_layers=1, num_heads=4, num_kv_heads=2, mlp_size=32)
QFORMER = QFormerConfig(32, 16, 32, 1, 4, 32, num_queries=4, cross_attention_frequency=1)
PFORMER = PFormerConfig(32, VOCABULARY, 32, 1, 4, 32, num_queries=4, max_length=96)
COMPOSED = MultimodalConfig({"image": Branch(ENCODER, QFORMER)}, LLM)
# Each position of a scene has a caption, and all of them belong to the image.
CAPTIONS = OpenMojiCaptions(image_size=16, variants=1, scene_share=0.2)
PAIRS = Mixture((Weighted(CAPTIONS),), rows=8, length=96, slots={"image": 1}, layout="caption", captions=4)
TEXTS = replace(PAIRS, sources=(Weighted(TextOnly(CAPTIONS)),), slots={})
ADAMW = AdamW(learning_rate=2e-3, warmup_steps=3)
PROMPTING = ("prompter/*", "text_projection/*", "temperature")


def experiment(
    model, stage: Stage, *pretrained: Pretrained, tokenizer: str | None = None, devices: int = 8, vocabulary=VOCABULARY
) -> Experiment:
    return Experiment(
        name=stage.name,
        model=model,
        stages=(stage,),
        tokenizer=TokenizerConfig(vocabulary, path=tokenizer),
        pretrained=pretrained,
        mesh=MeshConfig(data=devices),
        log_every=1,
    )


def guided(folder, devices: int = 8, **changes) -> Experiment:
    adamw = replace(ADAMW, learning_rate=4e-3)
    stage = replace(Stage("guided", PromptGuided(), ("projector_image/*",), PAIRS, STEPS, adamw), **changes)
    return experiment(
        COMPOSED,
        replace(stage, model=PromptGuidedConfig(COMPOSED, PFORMER)),
        Pretrained("llm", str(folder / "language"), "language"),
        Pretrained("prompter", str(folder / "prompter"), "prompt"),
        tokenizer=str(folder / "language" / "processor" / "tokenizer.json"),
        devices=devices,
    )


def losses(folder, name: str) -> list[float]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    values = [line[name] for line in lines if name in line]
    assert len(values) == STEPS
    return values


def flat(tree: dict) -> dict[str, np.ndarray]:
    return {path: np.asarray(x) for path, x in flatten_dict(jax.device_get(tree), sep="/").items()}


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Trains the three runs, the last one on eight devices and on one; returns their folder."""
    folder = tmp_path_factory.mktemp("pformer")
    words = replace(TEXTS, layout="conversation", learn="all", captions=1)
    language = Stage("language", NextToken(), ("llm/*",), words, STEPS, replace(ADAMW, learning_rate=1e-2))
    train(experiment(COMPOSED, language), folder / "language")
    prompt = Stage("prompt", PFormerObjective(equal_texts=True), PROMPTING, TEXTS, STEPS, ADAMW)
    source = Pretrained("llm", str(folder / "language"), "language")
    tokenizer = str(folder / "language" / "processor" / "tokenizer.json")
    model = PFormerPretrainingConfig(PFORMER, LLM, projection_size=16)
    train(experiment(model, prompt, source, tokenizer=tokenizer), folder / "prompter")
    train(guided(folder), folder / "eight")
    train(guided(folder, devices=1), folder / "one", devices=jax.devices()[:1])
    return folder


def test_the_prompter_learns(runs):
    parts = [losses(runs / "prompter", f"loss_{name}") for name in ("contrast", "nearness", "language")]
    total = losses(runs / "prompter", "loss")
    np.testing.assert_allclose(np.sum(parts, axis=0), total, rtol=1e-5)
    # The prompts of captions begin equal, and become different.
    assert parts[0][0] == pytest.approx(np.log(8), abs=1e-2)
    for values, share in ((parts[0], 0.85), (total, 0.95)):
        assert np.mean(values[-4:]) < share * np.mean(values[:4])
    assert len(set(losses(runs / "prompter", "temperature"))) > 1


def test_only_the_projector_moves_and_comes_closer(runs):
    alignment, language = (losses(runs / "eight", f"loss_{name}") for name in ("alignment", "language"))
    np.testing.assert_allclose(np.add(alignment, language), losses(runs / "eight", "loss"), rtol=1e-5)
    assert np.mean(alignment[-3:]) < 0.5 * np.mean(alignment[:2])
    assert np.mean(language[-3:]) < np.mean(language[:2])
    made = guided(runs)
    before = flat(initial_params(made, make_mesh(made.mesh))[0])
    after = flat(load_run(RunFolder(runs / "eight"))[2])
    moved = {path.split("/")[0] for path, x in after.items() if (x != before[path]).any()}
    assert moved == {"projector_image"}


def test_the_prompter_and_the_llm_are_those_that_were_trained(runs):
    made = guided(runs)
    params = initial_params(made, make_mesh(made.mesh))[0]
    for part, folder in (("prompter", "prompter"), ("llm", "language")):
        trained = flat(load_run(RunFolder(runs / folder))[2][part])
        ours = flat(params[part])
        assert ours.keys() == trained.keys()
        for path in ours:
            np.testing.assert_array_equal(ours[path], trained[path], err_msg=path)


def test_one_device_and_eight_learn_alike(runs):
    for name in ("loss", "loss_alignment", "loss_language"):
        np.testing.assert_allclose(losses(runs / "one", name), losses(runs / "eight", name), rtol=1e-4, err_msg=name)


def test_prompter_training_is_the_same_on_any_mesh(runs):
    """Checks that captions are contrasted with the whole batch and masked equally, on any device."""
    _, model, params, processor, _ = load_run(RunFolder(runs / "prompter"))
    batch = Pipeline(TEXTS, processor, seed=0).batch(0)
    assert "images" not in batch and batch["segments"].max() > 1
    params, apply = jax.device_get(params), make_apply(model)

    def loss(params, batch):
        return PFormerObjective().loss(apply, params, batch, jax.random.key(3))[0]

    alone = jax.jit(loss)(params, batch)
    mesh = make_mesh(MeshConfig(data=2, fsdp=4))
    with use_mesh(mesh):
        spread = jax.jit(loss)(params, jax.device_put(batch, jax.NamedSharding(mesh, jax.P(("data", "fsdp")))))
    assert spread == pytest.approx(float(alone), rel=1e-5)


def test_masks_leave_the_first_token_and_padding():
    segments = jnp.asarray(np.arange(40)[None] < np.array([[40], [11], [1]] * 100), jnp.int32)
    batch = dict(tokens=segments + 5, segments=segments)
    masked = np.asarray(PFormerObjective().mask(batch, jax.random.key(0)))
    may = (np.asarray(segments) > 0) & (np.arange(40) > 0)
    assert not masked[~may].any() and masked[may].mean() == pytest.approx(0.25, abs=0.02)
    assert (masked != np.asarray(PFormerObjective().mask(batch, jax.random.key(1)))).any()
    assert not PFormerObjective(mask_ratio=0.0).mask(batch, jax.random.key(0)).any()


def test_equal_captions_need_not_keep_apart():
    batch = dict(
        tokens=jnp.asarray([[1, 5, 6, 0], [1, 7, 0, 0], [1, 5, 6, 9], [1, 7, 8, 0]], jnp.int32),
        segments=jnp.asarray([[1, 1, 2, 0], [1, 1, 0, 0], [1, 1, 1, 0], [1, 1, 1, 0]], jnp.int32),
    )
    shares = PFormerObjective(label_smoothing=0.0, equal_texts=True)._targets(batch)
    assert shares.tolist() == [[0.5, 0, 0.5, 0], [0, 1, 0, 0], [0.5, 0, 0.5, 0], [0, 0, 0, 1]]
    np.testing.assert_allclose(PFormerObjective()._targets(batch), 0.9 * np.eye(4) + 0.025, rtol=1e-6)


def test_what_does_not_fit_is_refused(tmp_path):
    one = guided(tmp_path)
    alone = PFormerPretrainingConfig(PFORMER, LLM)
    prompt = Stage("prompt", PFormerObjective(), PROMPTING, TEXTS, 1)
    refused = {
        "NextToken for a PFormerPretrainingConfig": lambda: experiment(alone, replace(prompt, objective=NextToken())),
        "PromptGuided for a PFormerPretrainingConfig": lambda: experiment(
            alone, replace(prompt, objective=PromptGuided())
        ),
        "Contrastive for a PFormerPretrainingConfig": lambda: experiment(
            alone, replace(prompt, objective=Contrastive())
        ),
        "PFormerObjective for a MultimodalConfig": lambda: experiment(COMPOSED, prompt),
        "PromptGuided for a MultimodalConfig": lambda: experiment(COMPOSED, replace(one.stages[0], model=None)),
        "layout 'conversation' with slots {}": lambda: experiment(
            alone, replace(prompt, data=replace(TEXTS, layout="conversation"))
        ),
        "layout 'caption' with slots {'image': 2}": lambda: guided(tmp_path, data=replace(PAIRS, slots={"image": 2})),
        "captions of 97 positions for a P-Former of 96": lambda: guided(tmp_path, validation=replace(PAIRS, length=97)),
        r"prompter/\* frozen": lambda: guided(tmp_path, trainable=("p*",)),
        r"llm/\* frozen": lambda: experiment(alone, replace(prompt, trainable=("*",))),
        "3 prompts of width 32": lambda: PromptGuidedConfig(COMPOSED, replace(PFORMER, num_queries=3)),
        "4 prompts of width 16": lambda: PromptGuidedConfig(COMPOSED, replace(PFORMER, output_size=16)),
        "prompter.output_size 16": lambda: replace(alone, prompter=replace(PFORMER, output_size=16)),
        "401 for 400 tokens in model.prompter.vocab_size": lambda: experiment(
            replace(alone, llm=replace(LLM, vocab_size=500)), prompt, vocabulary=401
        ),
        "mask_ratio 1": lambda: PFormerObjective(mask_ratio=1),
        "on one row": lambda: PFormerObjective().loss(None, {}, dict(tokens=jnp.zeros((1, 4), int)), None),
    }
    for match, make in refused.items():
        with pytest.raises(ConfigError, match=match):
            make()


def test_a_part_is_not_read_with_another_tokenizer(runs, tmp_path):
    with pytest.raises(ConfigError, match="llm of .* with another tokenizer: .* words have other ids") as caught:
        train(replace(guided(runs), tokenizer=TokenizerConfig(300)), tmp_path / "other")
    assert str(runs / "language" / "processor" / "tokenizer.json") in str(caught.value)
    assert not list((tmp_path / "other").glob("**/arrays"))
