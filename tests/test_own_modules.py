"""The contributing page's own modules beside a config train, and are found when the run is opened."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

import pytest

from mllm_jax.checkpoints import own_modules
from mllm_jax.checkpoints.description import describe, rebuild
from mllm_jax.checkpoints.run import RunFolder
from mllm_jax.cli import main
from mllm_jax.errors import ConfigError
from mllm_jax.generation.assistant import Assistant
from mllm_jax.training.config_file import load_config

ROOT = Path(__file__).parents[1]
CONFIG = """
from grey_squares import BRIGHTNESS, BrightnessConfig, LinearConfig, Squares

from mllm_jax import Branch, DecoderConfig, Experiment, Mixture, MultimodalConfig, NextToken, Stage
from mllm_jax import TokenizerConfig, Weighted


def config():
    llm = DecoderConfig(vocab_size=320, hidden_size=16, num_layers=1, num_heads=2, num_kv_heads=1, mlp_size=32)
    model = MultimodalConfig({"image": Branch(BrightnessConfig(), LinearConfig())}, llm)
    data = Mixture((Weighted(Squares()),), rows=4, length=32, slots={"image": 2})
    stage = Stage("all", NextToken(), ("*",), data, steps=2)
    return Experiment("own", model, (stage,), TokenizerConfig(vocab_size=320), evaluation=(BRIGHTNESS,))
"""

# The same with the user's own language model, objective and optimizer.
OWN = CONFIG.replace(
    "DecoderConfig(vocab_size=320, hidden_size=16, num_layers=1, num_heads=2, num_kv_heads=1, mlp_size=32)",
    "OneLayerConfig(vocab_size=320)",
).replace('NextToken(), ("*",), data, steps=2)', 'Focal(), ("*",), data, steps=2, optimizer=Lion(1e-3))')


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Returns a config with a module beside it that is not yet imported; remembered folders are this test's."""
    _, code, language = re.findall(
        r"^```python\n(.*?)^```", (ROOT / "CONTRIBUTING.md").read_text(), re.DOTALL | re.MULTILINE
    )
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(sys, "path", list(sys.path))
    place = tmp_path / "project"
    place.mkdir()
    (place / "grey_squares.py").write_text(code)
    (place / "own_language.py").write_text(language)
    (place / "config.py").write_text(f"from own_language import Focal, Lion, OneLayerConfig\n{OWN}")
    yield place
    forget(monkeypatch)


def forget(monkeypatch) -> None:
    """Restores the state of a new process: nothing imported, no folder on the path."""
    for name in ("grey_squares", "own_language"):
        sys.modules.pop(name, None)
    monkeypatch.setattr(sys, "path", [entry for entry in sys.path if "project" not in entry])


def test_it_trains_and_is_found_again(folder, tmp_path, monkeypatch):
    run = RunFolder(tmp_path / "run")
    assert main(["train", str(folder / "config.py"), "--run-dir", str(run.path)]) == 0
    results = json.loads((run.path / "results.json").read_text())
    (found,) = results.values()
    assert list(results) == ["squares/brightness"] and found["n"] == 12 and 0 <= found["off_by"] <= 6
    assert list(found) == ["accuracy", "accuracy_shuffled_media", "majority", "off_by", "n"]
    report = (run.path / "report.html").read_text()
    assert "off by" in report and "how bright?" in report and report.count("data:image/png;base64,") == 4
    forget(monkeypatch)
    assert main(["evaluate", str(run.path), "--tasks", "brightness"]) == 0
    assert json.loads((run.path / "results.json").read_text()) == results, "greedy answers are the same again"
    forget(monkeypatch)
    experiment = run.experiment()
    parts = experiment.model.image.encoder, experiment.model.image.projector
    assert {type(part).__module__ for part in parts} == {"grey_squares"}
    stage = experiment.stages[0]
    own = experiment.model.llm, stage.objective, stage.optimizer
    assert [type(part).__name__ for part in own] == ["OneLayerConfig", "Focal", "Lion"]
    assert {type(part).__module__ for part in own} == {"own_language"}
    assert len(experiment.stages[0].data.sources) == 1
    answer = Assistant.load(run.path, by_layer=False).generate("how bright?", max_new_tokens=2)
    assert answer.tokens

    forget(monkeypatch)
    (folder / "grey_squares.py").unlink()
    with pytest.raises(ConfigError, match="module 'grey_squares', which is not found") as refusal:
        RunFolder(run.path).experiment()
    assert "PYTHONPATH" in refusal.value.todo and str(folder) in refusal.value.todo


def test_a_run_does_not_say_where_code_is_read_from(folder, tmp_path, monkeypatch):
    """Checks that without remembered folders a stored config imports only modules that Python itself finds."""
    described = describe(load_config(folder / "config.py"))
    assert str(folder) not in str(described)
    forget(monkeypatch)
    with pytest.raises(ConfigError, match="grey_squares"):
        rebuild(described)


def test_a_class_of_the_config_file_itself_is_refused(tmp_path):
    file = tmp_path / "config.py"
    own = "from dataclasses import dataclass\n\n@dataclass(frozen=True)\nclass Squares:\n    size: int = 4\n\n"
    text = CONFIG.replace("from grey_squares import BRIGHTNESS, BrightnessConfig, LinearConfig, Squares", "")
    text = text.replace("(BRIGHTNESS,)", "()").replace("def config", f"{own}def config")
    text = text.replace("BrightnessConfig()", "__import__('mllm_jax').ViTConfig(8, 4, 16, 1, 2, 32)")
    file.write_text(text.replace("LinearConfig()", "__import__('mllm_jax').MLPProjectorConfig(16)"))
    with pytest.raises(ConfigError, match="Squares, which the config file itself defines"):
        describe(load_config(file))


@pytest.mark.parametrize(
    "kind", ["os:system", "no_such_module_x:Config", "mllm_jax.errors:ConfigError", "a b:C", ":", "os"]
)
def test_what_is_no_config_class_is_refused(kind):
    with pytest.raises(ConfigError):
        rebuild({"class": kind})


def test_modules_of_a_description():
    nested = {"class": "a.b:C", "x": [{"class": "d:E"}, 1], "y": {"class": "mllm_jax.f:G"}}
    assert sorted(own_modules.modules_of(nested)) == ["a", "d", "mllm_jax"]
