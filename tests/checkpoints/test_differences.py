"""Configs as JSON: round trips, differences, and descriptions that are refused."""

from __future__ import annotations

import dataclasses
import json
import types

import numpy as np
import pytest

from mllm_jax.checkpoints.description import describe, rebuild
from mllm_jax.checkpoints.differences import binding_differences, differences
from mllm_jax.data.pipeline import Mixture
from mllm_jax.encoders.text_encoder import TextTowerConfig
from mllm_jax.encoders.vit import ViTConfig
from mllm_jax.errors import ConfigError
from mllm_jax.evaluation.metrics import normalise
from mllm_jax.llms.decoder import DecoderConfig
from mllm_jax.models.branch import Branch
from mllm_jax.models.clip import DualEncoderConfig
from mllm_jax.models.multimodal import MultimodalConfig
from mllm_jax.projectors.mlp import MLPProjectorConfig
from mllm_jax.training.config import Experiment, Stage, TokenizerConfig
from mllm_jax.training.objectives.contrastive import Contrastive
from mllm_jax.training.objectives.next_token import NextToken

TOWER = ViTConfig(8, 4, 12, 1, 2, 16, stem_channels=(4, 8))
DUAL = DualEncoderConfig(TOWER, TextTowerConfig(vocab_size=300), kind="sigmoid")
EXPERIMENT = Experiment(
    name="small",
    model=MultimodalConfig(
        inputs={"image": Branch(TOWER, MLPProjectorConfig(output_size=16))},
        llm=DecoderConfig(vocab_size=300, hidden_size=16, num_heads=4, num_kv_heads=2),
    ),
    tokenizer=TokenizerConfig(vocab_size=300),
    stages=(
        Stage("language", NextToken(z_loss=1e-4), ("llm/*",), Mixture(sources=(), slots={}), steps=3),
        Stage("instruct", Contrastive("sigmoid"), ("heads/*",), Mixture(sources=()), steps=5, model=DUAL),
    ),
)


def through_json(value):
    return json.loads(json.dumps(describe(value)))


def test_round_trip_through_json():
    again = rebuild(through_json(EXPERIMENT))
    assert again == EXPERIMENT
    assert type(again.stages[1].objective) is Contrastive and type(again.model.image.encoder.stem_channels) is tuple
    assert differences(through_json(EXPERIMENT), through_json(again)) == []


def test_the_class_is_beside_the_fields_and_collides_with_none():
    named = {"class": "mllm_jax.training.objectives.next_token:NextToken"}
    assert describe(NextToken(0.5, 64.0)) == named | {"z_loss": 0.5, "logits_mib": 64.0}
    # A field may be called `kind`, never `class`.
    described = describe(Contrastive("sigmoid"))
    assert described == {
        "class": "mllm_jax.training.objectives.contrastive:Contrastive",
        "kind": "sigmoid",
        "chunk": 1024,
    }


# Named by their classes: an address in a test's name would differ in each worker.
@pytest.mark.parametrize(
    "value", [np.zeros(2), {1, 2}, object(), NextToken, len], ids=lambda value: type(value).__name__
)
def test_what_is_no_plain_data_is_refused(value):
    with pytest.raises(ConfigError, match="a config value"):
        describe((1, value))


@pytest.mark.parametrize(
    "kind",
    [
        "os:getcwd",
        "builtins:dict",
        "tests.foo:Bar",
        "mllm_jax_evil:Config",
        "",
        "mllm_jax.checkpoints.description:describe",  # in the package, but not a config class
        "mllm_jax.errors:MllmError",
        "mllm_jax.checkpoints.description:importlib",
        "mllm_jax.checkpoints.differences:Gone",
        "mllm_jax.training.gone:Gone",
    ],
)
def test_foreign_and_vanished_classes_are_refused(kind):
    with pytest.raises(ConfigError) as refusal:
        rebuild([{"class": kind, "value": 3}])
    assert kind in refusal.value.given and refusal.value.expected and refusal.value.todo


def test_unknown_fields_are_refused():
    description = through_json(NextToken()) | {"zloss": 1.0}
    with pytest.raises(ConfigError, match="zloss"):
        rebuild(description)


def test_a_stored_config_is_checked_like_a_new_one():
    description = through_json(EXPERIMENT)
    description["model"]["inputs"]["image"]["projector"]["output_size"] = 15
    with pytest.raises(ConfigError, match="projector.output_size 15"):
        rebuild(description)


WRONG = {
    "seed": "x",
    "log_every": 1.5,
    "cpu_devices": True,
    "pretrained": "llm",
    "name": 3,
    "mesh.data": None,
    "model.inputs.image.encoder.num_layers": "2",
    "model.inputs.image.encoder.stem_channels": [4, "8"],
    "model.llm.tie_word_embeddings": 1,
    "model.llm.hidden_size": [16],
    "stages.0.steps": 3.0,
    "stages.0.trainable": [1],
    "stages.0.optimizer": {"class": "mllm_jax.sharding.mesh:MeshConfig"},
    "stages.0.objective": {"class": "mllm_jax.training.config:AdamW"},
    "stages.0.optimizer.factors": [["llm/*", "0.1"]],
}


@pytest.mark.parametrize("path", WRONG)
def test_a_leaf_of_another_type_is_refused_by_name(path):
    """Checks wrong leaves of config.json: `seed: "x"` was once accepted and failed later."""
    description = at = through_json(EXPERIMENT)
    *parents, name = path.split(".")
    for parent in parents:
        at = at[int(parent) if parent.isdigit() else parent]
    assert name in at
    at[name] = WRONG[path]
    with pytest.raises(ConfigError, match=f"{name}=.*expected") as refusal:
        rebuild(description)
    assert "mllm_jax." in refusal.value.given


def test_a_whole_number_is_a_float():
    description = through_json(EXPERIMENT)
    description["stages"][0]["optimizer"]["learning_rate"] = 1
    assert rebuild(description).stages[0].optimizer.learning_rate == 1


@pytest.mark.parametrize("name", ["../../x", "a/b", "", ".", "..", ".hidden", "a\\b", "a\0b", "C:x", "x" * 101])
def test_names_that_are_no_plain_names_are_refused(name):
    """Checks names that would become parts of paths in the run folder."""
    with pytest.raises(ConfigError, match="a stage named"):
        dataclasses.replace(EXPERIMENT.stages[0], name=name)
    with pytest.raises(ConfigError, match="an experiment named"):
        dataclasses.replace(EXPERIMENT, name=name)


def test_differences_name_every_leaf():
    model = EXPERIMENT.model.with_branch("image", encoder=dataclasses.replace(TOWER, num_layers=7))
    talk = dataclasses.replace(EXPERIMENT.stages[1], objective=NextToken(), model=None)
    stages = (EXPERIMENT.stages[0], talk)
    new = through_json(dataclasses.replace(EXPERIMENT, model=model, stages=stages, seed=1))
    old = through_json(EXPERIMENT)
    module = "mllm_jax.training.objectives"
    found = differences(old, new)
    assert sum(line.startswith("stages.1.model: ") for line in found) == 1, "a composition that is gone"
    assert sorted(line for line in found if not line.startswith("stages.1.model")) == [
        "model.inputs.image.encoder.num_layers: 1 -> 7",
        "seed: 0 -> 1",
        "stages.1.objective.chunk: 1024 -> (absent)",
        f"stages.1.objective.class: {module}.contrastive:Contrastive -> {module}.next_token:NextToken",
        "stages.1.objective.kind: sigmoid -> (absent)",
        "stages.1.objective.logits_mib: (absent) -> 128.0",
        "stages.1.objective.z_loss: (absent) -> 0.0",
    ]
    assert differences([1, 2], [1, 2, 3]) == [": [1, 2] -> [1, 2, 3]"]


def test_what_changes_no_numbers_does_not_bind_a_run_folder():
    old = through_json(EXPERIMENT)
    free = dataclasses.replace(EXPERIMENT, name="other", log_every=3, cpu_devices=8, nonfinite="skip")
    assert binding_differences(old, through_json(free)) == []
    validated = dict(validation=Mixture(sources=(), rows=3), validate_every=7, validation_batches=2)
    stages = tuple(dataclasses.replace(stage, **validated) for stage in EXPERIMENT.stages)
    assert binding_differences(old, through_json(dataclasses.replace(free, stages=stages))) == []
    bound = dataclasses.replace(free, seed=5, stages=stages)
    assert binding_differences(old, through_json(bound)) == ["seed: 0 -> 5"]


@pytest.mark.parametrize(
    "name",
    [
        "shutil:rmtree",  # a run folder from elsewhere chooses what is called with its own strings
        "subprocess:getoutput",
        "numpy:load",
        "mllm_jax.cli.commands:main",
        "mllm_jax.evaluation.evaluate:write_atomic",  # of another module
        "mllm_jax.evaluation.task:Task",
        "mllm_jax.evaluation.metrics:gone",
    ],
)
def test_a_stored_config_names_no_function_but_those_of_tasks(name):
    with pytest.raises(ConfigError) as refusal:
        rebuild({"function": name})
    assert name in refusal.value.given and refusal.value.todo


def test_a_function_that_is_not_found_again_is_refused_when_the_run_begins():
    renamed = types.FunctionType(normalise.__code__, {"__name__": normalise.__module__}, "other")
    for function in (json.dumps, describe, renamed):
        with pytest.raises(ConfigError, match="^the function .* of ") as refusal:
            describe({"prompt": function})
        assert "beside the config" in refusal.value.expected
    assert rebuild(describe(normalise)) is normalise
