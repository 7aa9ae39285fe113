"""configs/smollm2_openmoji.py from end to end, with a tiny random LLM and the smoke config for openmoji_scenes."""

from __future__ import annotations

import runpy
from dataclasses import replace

import jax
import pytest
from tiny_language import WITH_IMAGES, write_folder
from tiny_runs import ROOT
from toy_data import quick_compilation

from mllm_jax.checkpoints.run import RunFolder
from mllm_jax.errors import ConfigError
from mllm_jax.evaluation.run import evaluate_run
from mllm_jax.training.config_file import load_config
from mllm_jax.training.loop import train

CONFIG = ROOT / "configs" / "smollm2_openmoji.py"


@pytest.fixture
def llm(tmp_path):
    return write_folder(tmp_path / "llm", WITH_IMAGES)


def make(llm, scenes, tower, **options):
    return runpy.run_path(str(CONFIG))["experiment"](str(llm), scenes, str(tower), **options)


def test_the_shipped_config_follows_openmoji_scenes(llm, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match="python tests/assets/smollm2.py runs/smollm2-135m-instruct"):
        load_config(CONFIG)
    (tmp_path / "runs").mkdir()
    llm.rename(tmp_path / "runs" / "smollm2-135m-instruct")
    shipped, scenes = load_config(CONFIG), load_config(ROOT / "configs" / "openmoji_scenes.py")
    assert shipped.model.image.encoder == scenes.model.image.encoder
    read = {source.part: source for source in shipped.pretrained}
    assert set(read) == {"llm", "encoder_image"} and read["encoder_image"].made_by == scenes
    assert (read["encoder_image"].folder, read["encoder_image"].stage) == ("runs/openmoji_scenes", "contrastive")
    assert [stage.trainable for stage in shipped.stages] == [("projector_image/*",), ("projector_image/*", "llm/*")]
    assert all(stage.data.rows * stage.data.length <= 512 for stage in shipped.stages), "too much for two cores"


@pytest.mark.slow
def test_it_trains_and_is_evaluated(llm, tmp_path):
    smoke = load_config(ROOT / "configs" / "smoke.py")
    evaluation = tuple(task for task in smoke.evaluation if task.name.startswith("composition/"))
    short = replace(smoke, evaluation=evaluation, stages=tuple(replace(stage, steps=2) for stage in smoke.stages))
    # The tiny LLM's tokens are bytes, so rows are long.
    steps = {"align": 2, "instruct": 2}
    config = make(llm, short, tmp_path / "tower", steps=steps, rows=2, length=768, slots=3, limit=2)
    with quick_compilation():
        run = train(config, tmp_path / "run", devices=jax.devices()[:2])
        results = evaluate_run(run.path, devices=jax.devices()[:2], batch_size=4)
    assert run.unfinished(config) == [] and RunFolder(tmp_path / "tower").unfinished(short) == ["align", "instruct"]
    assert results and all(found["n"] for found in results.values()), "nothing was measured"
    assert "llm/*" in (run.path / "run.json").read_text() and (run.path / "report.html").is_file()
