"""Refusals of an experiment before anything is loaded, and the contents of the shipped configs."""

from __future__ import annotations

import warnings
from dataclasses import dataclass, replace

import jax
import pytest
import tyro
from flax.traverse_util import flatten_dict
from tiny_runs import ROOT
from toy_data import DUAL, IMAGES, MODEL, PAIRS

from mllm_jax.checkpoints.description import describe, rebuild
from mllm_jax.errors import ConfigError
from mllm_jax.evaluation.tasks.openmoji import openmoji_questions, openmoji_retrieval
from mllm_jax.models.params import placed_params
from mllm_jax.sharding.logical import data_parallel
from mllm_jax.sharding.mesh import MeshConfig, make_mesh
from mllm_jax.training.config import Experiment, Pretrained, Stage, TokenizerConfig
from mllm_jax.training.config_file import load_config
from mllm_jax.training.objectives.contrastive import Contrastive
from mllm_jax.training.objectives.next_token import NextToken
from mllm_jax.training.partition import split

STAGE = Stage("contrastive", Contrastive(), ("encoder_image/*",), PAIRS, steps=1, model=DUAL)
TALK = Stage("talk", NextToken(), ("llm/*",), IMAGES, steps=1)
EXPERIMENT = Experiment("small", MODEL, (STAGE,), TokenizerConfig(vocab_size=320))


@pytest.mark.parametrize(
    "change,given",
    [
        ({"stages": ()}, "stages []"),
        ({"stages": (STAGE, STAGE)}, "stages ['contrastive', 'contrastive']"),
        ({"nonfinite": "ignore"}, "nonfinite 'ignore'"),
        ({"tokenizer": TokenizerConfig(321)}, "a tokenizer of 321 for 320 tokens in model.llm.vocab_size"),
        (
            {"stages": (replace(STAGE, model=replace(DUAL, text=replace(DUAL.text, vocab_size=319))),)},
            "a tokenizer of 320 for 319 tokens in model.text.vocab_size",
        ),
        (
            {"stages": (replace(STAGE, data=replace(PAIRS, length=25)),)},
            "stage 'contrastive': captions of 25 positions for a text encoder of 24",
        ),
        (
            {"stages": (replace(STAGE, data=replace(PAIRS, captions=3)),)},
            "stage 'contrastive': up to 3 captions an image for heads of 2",
        ),
        ({"stages": (replace(STAGE, validation=replace(PAIRS, length=99)),)}, "captions of 99 positions"),
        ({"stages": (replace(STAGE, model=None),)}, "Contrastive for a MultimodalConfig"),
        ({"model": DUAL, "stages": (TALK,)}, "NextToken for a DualEncoderConfig"),
        ({"stages": (replace(STAGE, model=replace(DUAL, kind="sigmoid")),)}, "for a dual encoder of kind 'sigmoid'"),
        ({"stages": (replace(STAGE, model=replace(DUAL, captions=1)),)}, "up to 2 captions an image for heads of 1"),
        (
            {"stages": (replace(STAGE, model=replace(DUAL, vision=replace(DUAL.vision, num_layers=2))),)},
            "encoder_image of a DualEncoderConfig, which differs from that of a MultimodalConfig: num_layers",
        ),
        ({"pretrained": (Pretrained("encoder", "x"),)}, "pretrained parts ['encoder']"),
        ({"model": DUAL, "evaluation": openmoji_questions()}, "task 'validation/naming' for a DualEncoderConfig"),
        ({"evaluation": openmoji_retrieval()}, "OpenMojiRetrieval of a MultimodalConfig"),
        ({"evaluation": openmoji_questions() * 2}, "two tasks of evaluation named ['composition/gender'"),
        ({"evaluation": openmoji_questions()[0]}, "evaluation Task(name='validation/naming'"),
        ({"evaluation": ("naming",)}, "evaluation ('naming',)"),
        ({"mesh": MeshConfig(context=16)}, "rows of 24 positions over mesh.context 16"),
        ({"part_rules": (data_parallel("head"),)}, "rules of parts ['head']"),
        ({"part_rules": (data_parallel("llm"), data_parallel("llm"))}, "rules of parts ['llm', 'llm']"),
        ({"cpu_devices": 0}, "cpu_devices 0"),
        ({"cpu_devices": -2}, "cpu_devices -2"),
    ],
    ids=lambda value: value if isinstance(value, str) else None,
)
def test_impossible_experiments_are_refused(change, given):
    with pytest.raises(ConfigError) as refusal:
        replace(EXPERIMENT, **change)
    assert given in refusal.value.given and refusal.value.expected and refusal.value.todo


# ---- a user's own objective


@dataclass(frozen=True)
class Words:
    """An objective for models with at least `least` words."""

    least: int = 320

    def loss(self, apply, params, batch, key):
        return apply(params, batch).logits.mean(), {}

    def check(self, stage, model):
        if model.llm.vocab_size < self.least:
            raise ConfigError(f"{stage.name}: {model.llm.vocab_size} words", f"{self.least}", "raise vocab_size")


def test_an_objective_of_ones_own_says_what_it_trains():
    own = replace(TALK, objective=Words())
    assert replace(EXPERIMENT, stages=(own,)).stages[0].objective == Words()
    with pytest.raises(ConfigError, match="talk: 320 words"):
        replace(EXPERIMENT, stages=(replace(own, objective=Words(321)),))


def test_the_command_line_reads_any_objectives_fields():
    default = replace(EXPERIMENT, stages=(STAGE, TALK, replace(TALK, name="own", objective=Words())))
    given = ["--stages.0.objective.chunk", "8", "--stages.1.objective.z-loss", "0.5", "--stages.2.objective.least", "7"]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        read = tyro.cli(Experiment, args=given, default=default, config=(tyro.conf.AvoidSubcommands,))
    assert [stage.objective for stage in read.stages] == [Contrastive(chunk=8), NextToken(z_loss=0.5), Words(7)]
    assert read == replace(
        default,
        stages=tuple(replace(s, objective=r.objective) for s, r in zip(default.stages, read.stages, strict=True)),
    )


@pytest.mark.parametrize("objective", [None, "NextToken", PAIRS, NextToken], ids=str)
def test_what_is_no_objective_is_refused(objective):
    with pytest.raises(ConfigError, match="stage 'talk': objective") as refusal:
        replace(TALK, objective=objective)
    assert "`loss` and `check`" in refusal.value.expected


def test_rules_of_parts_are_kept_with_the_run():
    ruled = replace(EXPERIMENT, part_rules=(data_parallel("encoder_image"),), mesh=MeshConfig(context=8, slices=1))
    for kept in (ruled.part_rules, ruled.mesh):
        assert rebuild(describe(kept)) == kept


def test_rows_that_the_text_encoder_does_not_read_may_be_longer():
    """Checks conversations, which go to the LLM with unlimited positions, and a model without a text encoder."""
    talk = Stage("talk", NextToken(), ("llm/*",), replace(IMAGES, length=500), steps=1)
    assert replace(EXPERIMENT, stages=(STAGE, talk), cpu_devices=1).stages[1].data.length == 500
    bag = replace(DUAL, text=replace(DUAL.text, num_layers=0))
    captions = replace(STAGE, data=replace(PAIRS, length=99), model=bag)
    assert replace(EXPERIMENT, stages=(captions,)), "a bag of words has no positions"


@pytest.mark.parametrize("part,change", [("encoder", "pretrained"), ("projector", "part_rules")])
def test_an_old_name_of_a_part_is_refused_with_the_new_one(part, change):
    value = Pretrained(part, "x") if change == "pretrained" else data_parallel(part)
    with pytest.raises(ConfigError, match=f"the name is now '{part}_image'"):
        replace(EXPERIMENT, **{change: (value,)})


# ---- the shipped configs

TRAINED = {
    "language": {"llm"},
    "contrastive": {"encoder_image", "encoder_text", "heads"},
    "align": {"projector_image"},
    "describe": {"projector_image", "llm"},
    "instruct": {"projector_image", "llm"},
}


@pytest.fixture(scope="module", params=["quickstart", "openmoji_scenes", "openmoji_full"])
def shipped(request):
    return load_config(ROOT / "configs" / f"{request.param}.py")


def test_stages_train_the_parts_they_name(shipped):
    """Checks the parts in order; all other parts of a stage's composition are frozen."""
    assert [stage.name for stage in shipped.stages] == list(TRAINED)
    for stage in shipped.stages:
        params = placed_params(shipped.model_of(stage).make(), make_mesh(MeshConfig(), jax.devices()[:1]))
        trainable, frozen = split(params, stage.trainable)
        assert set(trainable) == TRAINED[stage.name]
        assert set(frozen) == set(params) - TRAINED[stage.name]
        assert len(flatten_dict(trainable)) + len(flatten_dict(frozen)) == len(flatten_dict(params))


def test_stages_read_what_fits_them(shipped):
    stages = {stage.name: stage for stage in shipped.stages}
    assert {name: type(stage.objective) for name, stage in stages.items()} == {
        name: Contrastive if name == "contrastive" else NextToken for name in TRAINED
    }
    assert not stages["language"].data.slots, "no images yet"
    assert stages["contrastive"].data.layout == "caption" and stages["contrastive"].data.group > 1
    assert all(stage.data.slots and stage.data.layout == "conversation" for stage in shipped.stages[2:])
    sizes = {w.source.image_size for stage in shipped.stages if stage.data.slots for w in stage.data.sources}
    assert sizes == {shipped.model.image_size}


def test_training_reads_the_training_split_and_validation_another(shipped):
    mixtures = {"data": set(), "validation": set()}
    for stage in shipped.stages:
        for kind, splits in mixtures.items():
            mixture = getattr(stage, kind)
            splits |= {weighted.source.split for weighted in mixture.sources} if mixture else set()
    assert mixtures == {"data": {"train"}, "validation": {"validation"}}


def test_the_full_config_is_that_of_scenes_on_all_images():
    scenes, full = (load_config(ROOT / "configs" / f"{name}.py") for name in ("openmoji_scenes", "openmoji_full"))
    assert (scenes.name, full.name) == ("openmoji_scenes", "openmoji_full")
    assert full.model == scenes.model
    assert full.tokenizer == scenes.tokenizer
    for experiment, config in ((scenes, "quickstart"), (full, "full")):
        mixtures = [m for stage in experiment.stages for m in (stage.data, stage.validation) if m is not None]
        assert {weighted.source.config for mixture in mixtures for weighted in mixture.sources} == {config}
        assert {task.source.config for task in experiment.evaluation} == {config}
