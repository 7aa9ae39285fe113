"""Metrics go to Weights & Biases on request; a missing package is reported at once."""

from __future__ import annotations

import json
import sys
from types import ModuleType, SimpleNamespace

import pytest

from mllm_jax import (
    Branch,
    DecoderConfig,
    Experiment,
    Mixture,
    MLPProjectorConfig,
    MultimodalConfig,
    NextToken,
    Stage,
    TokenizerConfig,
    ViTConfig,
)
from mllm_jax.cli import train as command
from mllm_jax.errors import ConfigError
from mllm_jax.training.operations.metrics_writer import MetricsWriter
from mllm_jax.training.operations.wandb import Wandb

EXPERIMENT = Experiment(
    name="small",
    model=MultimodalConfig(
        {"image": Branch(ViTConfig(8, 4, 12, 1, 2, 16), MLPProjectorConfig(16))},
        DecoderConfig(vocab_size=300, hidden_size=16, num_heads=4, num_kv_heads=2),
    ),
    tokenizer=TokenizerConfig(vocab_size=300),
    stages=(Stage("talk", NextToken(), ("llm/*",), Mixture(sources=()), steps=3),),
)


class Fake(ModuleType):
    """The used part of the package; records the calls."""

    def __init__(self):
        super().__init__("wandb")
        self.begun, self.logged, self.ended = [], [], []

    def init(self, **options):
        self.begun.append(options)
        return SimpleNamespace(
            define_metric=lambda name, step_metric: None,
            log=self.logged.append,
            finish=lambda exit_code: self.ended.append(exit_code),
        )


@pytest.fixture
def wandb(monkeypatch):
    fake = Fake()
    monkeypatch.setitem(sys.modules, "wandb", fake)
    return fake


def test_each_line_goes_there_and_a_run_that_goes_on_is_the_same_there(wandb, tmp_path):
    for finished in (False, True):
        sink = Wandb("project")
        sink.begin(EXPERIMENT, tmp_path)
        with MetricsWriter(tmp_path, sinks=(sink,)) as writer:
            writer.write(7, "talk", {"loss": 2.0}, {"mfu": 0.5})
        sink.close(finished)
    first, second = wandb.begun
    assert first["id"] == second["id"] == json.loads((tmp_path / "wandb.json").read_text())["id"]
    assert (first["project"], first["name"], first["resume"]) == ("project", "small", "allow")
    assert first["config"]["stages"][0]["steps"] == 3
    assert wandb.logged == [{"step": 7, "talk/loss": 2.0, "timing/mfu": 0.5}] * 2
    assert wandb.ended == [1, 0]
    Wandb("another").begin(EXPERIMENT, tmp_path)
    assert wandb.begun[-1]["id"] != first["id"]


@pytest.mark.parametrize("there", ["nothing", "a folder of earlier runs"])
def test_without_the_package_it_is_said_before_anything_is_read(monkeypatch, there):
    monkeypatch.setitem(sys.modules, "wandb", None if there == "nothing" else ModuleType("wandb"))
    monkeypatch.setattr(command, "load_config", lambda path: pytest.fail("the config was read"))
    for option in (["--wandb", "project"], ["--wandb=project"]):
        with pytest.raises(ConfigError, match=r"pip install 'mllm-jax\[wandb\]'"):
            command.run(["config.py", *option])


def test_what_wandb_refuses_is_a_refusal_of_ours(wandb, tmp_path):
    def init(**_):
        raise RuntimeError("api_key not configured")

    wandb.init = init
    with pytest.raises(ConfigError, match="api_key not configured(.|\n)*wandb login"):
        Wandb("project").begin(EXPERIMENT, tmp_path)


def test_the_command_hands_it_to_the_training(wandb, tmp_path, monkeypatch):
    from mllm_jax.training import loop

    given = {}
    monkeypatch.setattr(loop, "train", lambda *_, **options: given.update(options))
    monkeypatch.setattr("mllm_jax.evaluation.report.write_report", lambda folder: folder)
    monkeypatch.setattr(command, "keep_compiled_programs", lambda: None)
    monkeypatch.setattr(command, "load_config", lambda path: EXPERIMENT)
    assert command.run(["config.py", "--run-dir", str(tmp_path / "run"), "--wandb", "project"]) == 0
    (sink,) = given["sinks"]
    assert isinstance(sink, Wandb) and sink.project == "project"
