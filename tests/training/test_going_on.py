"""A run that continues with another config: with more steps it ends as one that had them from the beginning."""

from __future__ import annotations

import json
import shutil
import time
from contextlib import redirect_stdout
from dataclasses import replace
from io import StringIO
from pathlib import Path

import jax
import numpy as np
import pytest
import toy_data
from tiny_runs import arrays, metrics
from toy_evaluation import colours

from mllm_jax.checkpoints.run import RunFolder
from mllm_jax.checkpoints.training import snapshot_meta
from mllm_jax.cli.config_help import parsed
from mllm_jax.cli.train import _default
from mllm_jax.data.pipeline import Mixture, Weighted
from mllm_jax.errors import ConfigError, RunFolderError
from mllm_jax.evaluation.report import write_report
from mllm_jax.layers.compute import Compute
from mllm_jax.sharding.mesh import MeshConfig
from mllm_jax.training.config import AdamW, CheckpointConfig, Experiment, Stage, TokenizerConfig
from mllm_jax.training.feed import Feed
from mllm_jax.training.hooks import Validate
from mllm_jax.training.loop import train
from mllm_jax.training.objectives.next_token import NextToken
from mllm_jax.training.operations import run_folder
from mllm_jax.training.operations.run_folder import open_run

SHORT, LONG = 8, 12
TASK = colours("toy/colour", toy_data.Toy(images=0), max_new_tokens=2)
MIXTURE = Mixture((Weighted(toy_data.Toy(images=0)),), rows=4, length=24, slots={})
CONSTANT = AdamW(learning_rate=1e-2, warmup_steps=10, schedule="constant")
STAGE = Stage("talk", NextToken(), ("llm/*",), MIXTURE, SHORT, CONSTANT)
EXPERIMENT = Experiment(
    name="going-on",
    model=toy_data.MODEL,
    stages=(STAGE,),
    tokenizer=TokenizerConfig(vocab_size=320),
    mesh=MeshConfig(data=1),
    log_every=1,
    checkpoint=CheckpointConfig(every_steps=5),
)


def changed(experiment: Experiment = EXPERIMENT, number: int = 0, **fields) -> Experiment:
    """Returns the experiment with other fields of a stage."""
    stages = list(experiment.stages)
    stages[number] = replace(stages[number], **fields)
    return replace(experiment, stages=tuple(stages))


def run(experiment: Experiment, folder: Path, **options) -> str:
    """Trains, and returns the printed text."""
    printed = StringIO()
    with toy_data.quick_compilation(), redirect_stdout(printed):
        train(experiment, folder, devices=jax.devices()[:1], **options)
    return printed.getvalue()


class Kill(Exception):
    """An exception that ends a run as suddenly as a signal, as far as its folder shows."""


class Killing:
    """A sink that ends the run at a step, once an earlier checkpoint, written in the background, is complete."""

    def __init__(self, step: int, saved: Path):
        self.step, self.saved = step, saved

    def begin(self, experiment, folder):
        pass

    def write(self, step, stage, values, timing):
        if step == self.step and "loss" in values:
            until = time.monotonic() + 600
            while not self.saved.is_file():
                assert time.monotonic() < until, f"no {self.saved}"
                time.sleep(0.01)
            raise Kill

    def close(self, finished):
        assert not finished


def killed(experiment: Experiment, folder: Path, step: int, saved: int) -> None:
    """Trains up to a step, with a checkpoint of step `saved`."""
    with pytest.raises(Kill):
        run(experiment, folder, sinks=(Killing(step, folder / f"checkpoints/0-talk/{saved:08d}/manifest.json"),))


def refusal(experiment: Experiment, folder: Path) -> str:
    with pytest.raises(RunFolderError) as refused:
        open_run(folder, experiment)
    assert refused.value.given and refused.value.expected and refused.value.todo
    return str(refused.value)


@pytest.fixture(scope="module", autouse=True)
def compiled(tmp_path_factory):
    """Shares compiled programs among all of these runs."""
    with toy_data.kept_programs(tmp_path_factory.mktemp("compiled")):
        yield


@pytest.fixture(scope="module")
def short(tmp_path_factory) -> Path:
    """Trains a run of SHORT steps to its end."""
    folder = tmp_path_factory.mktemp("runs") / "short"
    run(EXPERIMENT, folder)
    return folder


@pytest.fixture
def folder(short, tmp_path) -> Path:
    """Copies the short run."""
    return shutil.copytree(short, tmp_path / "run")


def changes(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "changes.jsonl").read_text().splitlines()]


def said(experiment: Experiment, folder: Path) -> str:
    lines: list[str] = []
    open_run(folder, experiment, say=lines.append)
    return "\n".join(lines)


# ---- more steps


def test_more_steps_end_as_if_planned_so_even_when_killed_between(folder, tmp_path):
    """Checks TRIAL, row 30: 120 steps after the finished 80 were refused."""
    more, whole = changed(steps=LONG), tmp_path / "whole"
    run(more, whole)
    killed(more, folder, 11, saved=10)
    assert RunFolder(folder).unfinished(more) == ["talk"] and RunFolder(folder).ended(more) == 1
    assert snapshot_meta(RunFolder(folder).snapshot(0, "talk"))["facts"]["steps"] == SHORT, "to be asked meanwhile"
    printed = run(more, folder)
    assert "stage talk: resumed at step 10" in printed and "another config" not in printed
    assert changes(folder) == [{"stage": "talk", "step": 8, "field": "stages.0.steps", "from": 8, "to": 12}]
    for name in ("stages/0-talk", f"checkpoints/0-talk/{LONG:08d}"):
        assert arrays(folder / name) == arrays(whole / name), "not the same bits"
    assert metrics(folder) == metrics(whole) and len(metrics(whole)) == LONG
    assert RunFolder(folder).unfinished(more) == []
    page = write_report(folder).read_text()
    assert "Changes on the way" in page and "stages.0.steps" in page


def test_the_command_takes_the_runs_folder_and_the_changed_field(short):
    options = parsed("train", _default(short), [str(short), "--stages.0.steps", str(LONG)])
    assert options.experiment == changed(steps=LONG) and options.run_dir == short


def test_what_depends_on_the_end_is_said(folder):
    printed = said(changed(steps=LONG), folder)
    assert "stage talk continues from step 8" in printed and "stages.0.steps: 8 -> 12" in printed
    assert "does not depend on the number of steps (schedule constant)" in printed
    cosine = replace(CONSTANT, schedule="cosine", learning_rate=1e-3)
    printed = said(changed(steps=16, optimizer=cosine), folder)
    assert "stages.0.optimizer.learning_rate: 0.01 -> 0.001" in printed
    assert "differs from a run planned with 16 steps" in printed and "the cosine of 16" in printed
    assert [(one["field"], one["to"]) for one in changes(folder)] == [
        ("stages.0.steps", 12),
        ("stages.0.optimizer.learning_rate", 1e-3),
        ("stages.0.optimizer.schedule", "cosine"),
        ("stages.0.steps", 16),
    ]


def test_a_kill_between_the_record_and_the_config_records_once(folder, monkeypatch):
    def die(*_):
        raise Kill

    with monkeypatch.context() as patched, pytest.raises(Kill):
        patched.setattr(run_folder, "write_json", die)
        open_run(folder, changed(steps=LONG))
    assert RunFolder(folder).experiment() == EXPERIMENT
    assert "8 -> 12" in said(changed(steps=LONG), folder)
    assert len(changes(folder)) == 1 and said(changed(steps=LONG), folder) == ""


def test_other_rows_go_on_in_the_data_where_it_was(folder, monkeypatch):
    asked, iterate = [], Feed.iterate
    monkeypatch.setattr(Feed, "iterate", lambda feed, *steps: asked.append(steps) or iterate(feed, *steps))
    data, cosine = replace(MIXTURE, rows=2), replace(CONSTANT, schedule="cosine", factors=(("llm/*", 0.5),))
    printed = run(changed(steps=LONG, data=data, accumulate=2, optimizer=cosine), folder)
    assert asked == [(16, 20)], "eight batches of 4 rows are 16 of 2"
    assert "stages.0.data.rows: 4 -> 2" in printed and "the data continues at its position" in printed
    assert {one["field"].split(".")[2] for one in changes(folder)} == {"steps", "data", "accumulate", "optimizer"}
    record = json.loads((folder / f"checkpoints/0-talk/{LONG:08d}/record.json").read_text())
    assert (record["meta"]["step"], record["meta"]["data_step"]) == (12, 20)


# ---- changes that are allowed, and changes that are refused by name

FREE = {
    "learning rate": changed(optimizer=replace(CONSTANT, learning_rate=1.0)),
    "factors": changed(optimizer=replace(CONSTANT, factors=(("llm/*", 0.5),))),
    "validation": changed(validation=MIXTURE, validate_every=3, validation_batches=1, patience=2),
    "evaluation": changed(replace(EXPERIMENT, evaluation=(TASK,)), evaluate_every=2, evaluate_limit=1),
    "batch": changed(data=replace(MIXTURE, rows=8), accumulate=2),
    "frozen dtype": changed(frozen_dtype="bfloat16"),
    "dtype": replace(EXPERIMENT, model=replace(toy_data.MODEL, compute=Compute(dtype="bfloat16"))),
    "remat": replace(EXPERIMENT, model=replace(toy_data.MODEL, compute=Compute(remat="full"))),
}
REFUSED = {
    "stages.0.steps: 8 -> 7, where stage talk has done 8": changed(steps=7),
    "model.llm.mlp_size: 64 -> 32": replace(
        EXPERIMENT, model=replace(toy_data.MODEL, llm=replace(toy_data.MODEL.llm, mlp_size=32))
    ),
    "stages.0.objective.z_loss: 0.0 -> 0.1": changed(objective=NextToken(z_loss=0.1)),
    "stages.0.ema: None -> 0.9": changed(ema=0.9),
    "stages.0.trainable.0: llm/* -> *": changed(trainable=("*",)),
    "stages.0.data.sources.0.source.size: 200 -> 100": changed(
        data=replace(MIXTURE, sources=(Weighted(toy_data.Toy(images=0, size=100)),))
    ),
    "stages.0.data.length: 24 -> 32": changed(data=replace(MIXTURE, length=32)),
    "seed: 0 -> 1": replace(EXPERIMENT, seed=1),
    "tokenizer.vocab_size: 320 -> 300": replace(EXPERIMENT, tokenizer=TokenizerConfig(vocab_size=300)),
}


@pytest.mark.parametrize("what", FREE)
def test_what_only_later_steps_depend_on_may_change(folder, what):
    assert open_run(folder, FREE[what]).experiment() == FREE[what]
    assert changes(folder)


@pytest.mark.parametrize("named", REFUSED)
def test_what_was_trained_already_may_not_change(short, named):
    before = {path: path.read_bytes() for path in short.glob("*.json*")}
    assert named in refusal(REFUSED[named], short)
    assert before == {path: path.read_bytes() for path in short.glob("*.json*")}


def test_a_stage_that_others_built_on_is_closed(folder):
    two = replace(EXPERIMENT, stages=(STAGE, replace(STAGE, name="later")))
    open_run(folder, two)
    more = replace(two, stages=(replace(STAGE, steps=LONG), two.stages[1]))
    (RunFolder(folder).checkpoints(1, "later") / "00000003").mkdir(parents=True)
    assert "stages.0.steps: 8 -> 12" in refusal(more, folder)
    shutil.rmtree(RunFolder(folder).checkpoints(1, "later"))
    assert open_run(folder, more).unfinished(more) == ["talk", "later"]


def test_a_run_of_an_older_version_lacks_fields_and_goes_on(folder):
    config = json.loads((folder / "config.json").read_text())
    for name in ("patience", "evaluate_every", "evaluate", "evaluate_limit", "ema"):
        del config["stages"][0][name]
    del config["stages"][0]["optimizer"]["schedule"]
    config["stages"].append(config["stages"][0] | {"name": "later"})
    (folder / "config.json").write_text(json.dumps(config))
    cosine = replace(STAGE, optimizer=replace(CONSTANT, schedule="cosine"))  # the only schedule of older versions
    two = replace(EXPERIMENT, stages=(cosine, replace(cosine, name="later")))
    (RunFolder(folder).checkpoints(1, "later") / "00000003").mkdir(parents=True)
    assert open_run(folder, two).experiment() == two and not (folder / "changes.jsonl").exists()


def test_without_the_optimizers_state_no_more_steps(folder):
    shutil.rmtree(RunFolder(folder).checkpoints(0, "talk"))
    assert "stages.0.steps: 8 -> 12, without a checkpoint" in refusal(changed(steps=LONG), folder)


# ---- evaluation in the loop


def test_evaluation_in_the_loop_changes_nothing_of_the_training(short, tmp_path):
    folder = tmp_path / "run"
    printed = run(changed(replace(EXPERIMENT, evaluation=(TASK,)), evaluate_every=4, evaluate_limit=2), folder)
    assert "stage talk, step 4: toy/colour: accuracy" in printed and "step 8: toy/colour" in printed
    lines = [line for line in metrics(folder) if "evaluation/toy/colour/accuracy" in line]
    assert [(line["step"], line["evaluation/toy/colour/n"]) for line in lines] == [(4, 2), (8, 2)]
    assert arrays(folder / "stages/0-talk") == arrays(short / "stages/0-talk")
    page = write_report(folder).read_text()
    assert "evaluation/toy/colour/accuracy" in page


@pytest.mark.parametrize(
    ("named", "fields", "tasks"),
    [
        ("evaluates by all tasks", {"evaluate_every": 2}, ()),
        ("evaluates by \\['other'\\]", {"evaluate_every": 2, "evaluate": ("other",)}, (TASK,)),
        ("evaluate without evaluate_every", {"evaluate": ("toy/colour",)}, (TASK,)),
        ("evaluate_limit without evaluate_every", {"evaluate_limit": 3}, (TASK,)),
        ("evaluate_every 0", {"evaluate_every": 0}, (TASK,)),
        ("patience without validation", {"patience": 2}, ()),
        ("ema 1.0", {"ema": 1.0}, ()),
        ("ema 0", {"ema": 0}, ()),
        ("patience 0", {"patience": 0, "validation": MIXTURE}, ()),
        ("task 'toy/colour' for a DualEncoderConfig", {"evaluate_every": 2, "model": toy_data.DUAL}, (TASK,)),
    ],
)
def test_what_does_not_fit_together_is_refused(named, fields, tasks):
    with pytest.raises(ConfigError, match=named):
        replace(EXPERIMENT, stages=(replace(STAGE, **fields),), evaluation=tasks)


# ---- the moving average


def test_the_moving_average_is_kept_and_survives_a_kill(short, tmp_path):
    """Checks that the training is the same, and that the stage keeps the average, also of a run that was killed."""
    smooth, whole, again = changed(ema=0.7), tmp_path / "whole", tmp_path / "again"
    run(smooth, whole)
    killed(smooth, again, 7, saved=5)
    assert "stage talk: resumed at step 5" in run(smooth, again)
    end, stage = "checkpoints/0-talk/00000008", "stages/0-talk"
    plain, held, kept = arrays(short / end), arrays(whole / end), arrays(whole / stage)
    assert arrays(again / end) == held and arrays(again / stage) == kept
    raw = [path for path in plain if path.startswith("state/params/")]
    for path in raw:  # another program may round otherwise
        one, two = (np.frombuffer(found[path][2], found[path][0]) for found in (plain, held))
        np.testing.assert_allclose(one, two, rtol=1e-4, atol=1e-5)
    added = [path for path in held if path not in plain and "/params/" in path]
    assert kept == {path.partition("/params/")[2]: held[path] for path in added} and len(kept) == len(raw) > 0
    assert all(kept[path] != held[f"state/params/{path}"] for path in kept)


# ---- early stopping


def test_early_stopping_keeps_the_best_parameters_and_survives_a_kill(folder, monkeypatch):
    """Checks a best loss after 4 steps, and a second validation without a smaller one after 10."""
    scores = {2: 3.0, 4: 2.0, 6: 2.0, 8: 4.0, 10: 5.0}
    monkeypatch.setattr(Validate, "_validate", lambda self, params, step: {"validation_loss": scores[step]})
    patient = changed(steps=20, validation=MIXTURE, validate_every=2, patience=3)
    shutil.rmtree(folder)
    killed(patient, folder, 7, saved=5)
    printed = run(patient, folder)
    assert "stage talk: resumed at step 5" in printed
    assert "step 6: validation loss 2.0000" in printed
    assert "step 10: no smaller validation loss for 3 validations" in printed
    assert "step 10: the parameters of step 4 are kept, with validation loss 2.0000" in printed
    trained = arrays(folder / "stages/0-talk")
    best = arrays(folder / "checkpoints/0-talk/00000004")
    assert trained == {path: best[f"state/params/{path}"] for path in trained}
    (facts,) = json.loads((folder / "run.json").read_text())["stages"]
    early = {"best_step": 4, "validation_loss": 2.0, "stopped": True, "patience": 3}
    assert (facts["steps"], facts["early_stopping"]) == (10, early)
    assert RunFolder(folder).unfinished(patient) == []
    # With more patience it continues from its end, which repeating the command has not changed.
    shutil.rmtree(folder / "stages")  # killed after the last checkpoint, and before the result was written
    assert "step 10: the parameters of step 4 are kept" in run(patient, folder)
    assert arrays(folder / "stages/0-talk") == trained
    more = changed(patient, patience=4)
    assert open_run(folder, more).unfinished(more) == ["talk"]
    assert open_run(folder, patient).unfinished(patient) == []
