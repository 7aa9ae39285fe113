"""A run folder is opened, refused or cleared; files that a run did not write stay as they are."""

from __future__ import annotations

import dataclasses
import errno
import json
import os
from functools import partial
from pathlib import Path

import pytest
from tiny_language import byte_tokenizer

from mllm_jax import (
    Branch,
    DecoderConfig,
    Experiment,
    Mixture,
    MLPProjectorConfig,
    MultimodalConfig,
    NextToken,
    RunFolder,
    Stage,
    TokenizerConfig,
    ViTConfig,
)
from mllm_jax.checkpoints.run import read_json
from mllm_jax.data.tokenizer import Tokenizer
from mllm_jax.errors import ConfigError, RunFolderError
from mllm_jax.training.config import AdamW, Pretrained
from mllm_jax.training.operations import run_folder
from mllm_jax.training.operations.run_folder import FILES, FOLDERS, MEASURED, holding, open_run, write_json
from mllm_jax.training.operations.run_lock import MARK
from mllm_jax.training.pretrained import require_words

EXPERIMENT = Experiment(
    name="small",
    model=MultimodalConfig(
        {"image": Branch(ViTConfig(8, 4, 12, 1, 2, 16), MLPProjectorConfig(16))},
        DecoderConfig(vocab_size=300, hidden_size=16, num_heads=4, num_kv_heads=2),
    ),
    tokenizer=TokenizerConfig(vocab_size=300),
    stages=tuple(Stage(name, NextToken(), ("llm/*",), Mixture(sources=()), steps=3) for name in "abc"),
)
OTHER = dataclasses.replace(EXPERIMENT, seed=1)
SAME = dataclasses.replace(EXPERIMENT, log_every=3)  # changes no result


def refused(*args, **options) -> str:
    with pytest.raises(RunFolderError) as refusal:
        open_run(*args, **options)
    assert refusal.value.given and refusal.value.expected and refusal.value.todo
    return str(refusal.value)


def contents(folder: Path) -> dict[str, bytes]:
    """Returns the bytes of every file but our mark."""
    files = [p for p in sorted(folder.rglob("*")) if p.is_file() and p.name != MARK]
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in files}


@pytest.fixture
def full(tmp_path):
    """Makes a run folder with an entry for every name that a run writes, and a file of another program."""
    folder = open_run(tmp_path / "run", EXPERIMENT)
    for name in FOLDERS:
        (folder.path / name / "0-a").mkdir(parents=True)
        (folder.path / name / "0-a" / "x").write_text("x")
    for name in ("run.json", *MEASURED):
        (folder.path / name).write_text("{}")
    (folder.path / "notes.txt").write_text("mine")
    return folder


def test_a_new_folder_holds_the_experiment(tmp_path):
    folder = open_run(tmp_path / "deep" / "run", EXPERIMENT)
    assert folder == RunFolder(tmp_path / "deep" / "run")
    assert folder.experiment() == EXPERIMENT
    assert {p.name for p in folder.path.iterdir()} == {"config.json", MARK}, "a temporary file is left"
    assert folder.unfinished(EXPERIMENT) == ["a", "b", "c"]


def test_a_stage_is_unfinished_from_the_first_that_did_not_end(tmp_path):
    folder = RunFolder(tmp_path)
    folder.snapshot(0, "a").mkdir(parents=True)
    folder.snapshot(2, "c").mkdir()
    assert folder.unfinished(EXPERIMENT) == ["b", "c"]
    folder.snapshot(1, "b").mkdir()
    assert folder.unfinished(EXPERIMENT) == []


def test_the_same_experiment_goes_on_and_another_is_refused(full):
    before = contents(full.path)
    message = refused(full.path, OTHER)
    assert "seed: 0 -> 1" in message and "--fresh" in message
    assert contents(full.path) == before
    assert open_run(full.path, SAME).experiment() == SAME, "what may change is kept up to date"


def test_many_differences_are_counted(tmp_path):
    folder = open_run(tmp_path, EXPERIMENT)
    for index, name in enumerate("abc"):
        folder.snapshot(index, name).mkdir(parents=True)
    stages = tuple(
        dataclasses.replace(s, steps=9, trainable=("*",), accumulate=2, name=s.name * 2) for s in OTHER.stages
    )
    message = refused(tmp_path, dataclasses.replace(OTHER, stages=stages))
    assert "... 1 more" in message and message.count(" -> ") == 10, "steps and pieces of the last stage may change"


def test_measurements_stay_until_the_parameters_change(full):
    open_run(full.path, EXPERIMENT)
    assert not any((full.path / name).exists() for name in MEASURED), "they are of a stage that goes on"
    for index, name in enumerate("abc"):
        full.snapshot(index, name).mkdir(exist_ok=True)
    (full.path / "results.json").write_text("{}")
    open_run(full.path, EXPERIMENT)
    assert (full.path / "results.json").exists()


def test_fresh_removes_what_a_run_writes_and_nothing_else(full):
    (full.path / ".stages.removed").mkdir()  # an earlier removal was interrupted here
    (full.path / ".stages.removed" / "x").write_text("x")
    (full.path / "metrics.jsonl.tmp").write_text("x")
    open_run(full.path, OTHER, fresh=True)
    assert sorted(contents(full.path)) == ["config.json", "notes.txt"]
    assert full.experiment() == OTHER


@pytest.mark.parametrize("reached", ["nothing", "stage", "checkpoint"])
def test_a_run_without_a_step_gives_way_to_another_config(tmp_path, reached):
    """Checks that after a refusal before the first step, the corrected config trains in the folder (TRIAL, row 31)."""
    folder = open_run(tmp_path, EXPERIMENT)
    folder.processor_folder.mkdir()
    folder.tokenizer_file.write_text("of the first config")
    folder.checkpoints(0, "a").mkdir(parents=True)  # a start makes it before any step
    (tmp_path / "notes.txt").write_text("mine")
    if reached == "stage":
        folder.snapshot(0, "a").mkdir(parents=True)
    if reached == "checkpoint":
        (folder.checkpoints(0, "a") / "00000003").mkdir()
    if reached != "nothing":
        assert "another config" in refused(tmp_path, OTHER)
        assert folder.tokenizer_file.exists()
        return
    assert open_run(tmp_path, OTHER).experiment() == OTHER
    assert sorted(contents(tmp_path)) == ["config.json", "notes.txt"], "the tokenizer of the first config stayed"


def test_a_stage_that_has_not_begun_may_change(tmp_path):
    """Checks another learning rate or number of steps for later stages (TRIAL, row 30)."""
    folder = open_run(tmp_path, EXPERIMENT)
    folder.snapshot(0, "a").mkdir(parents=True)
    (folder.checkpoints(1, "b") / "00000002").mkdir(parents=True)
    first, second, third = EXPERIMENT.stages
    faster = dataclasses.replace(third, steps=9, optimizer=AdamW(1e-5))
    changed = dataclasses.replace(EXPERIMENT, stages=(first, dataclasses.replace(second, validate_every=5), faster))
    assert open_run(tmp_path, changed).experiment() == changed
    assert open_run(tmp_path, dataclasses.replace(changed, stages=(first, second))).unfinished(changed) == ["b", "c"]
    for stages in (
        (dataclasses.replace(first, steps=9), second),
        (first, dataclasses.replace(second, trainable=("*",))),
        (first,),
    ):
        assert "another config" in refused(tmp_path, dataclasses.replace(changed, stages=stages))


@pytest.mark.parametrize("config", ['{"a": 1}', "[", "", '{"class": "mllm_jax.training.config:AdamW"}'])
def test_fresh_spares_other_programs_files_under_our_names(tmp_path, config):
    """Checks names that other trainers write too: `stages`, `checkpoints`, `report.html`, config.json (ATTACK, F1)."""
    for name in FOLDERS:
        (tmp_path / name).mkdir()
        (tmp_path / name / "thesis.txt").write_text("mine")
    for name in FILES:
        (tmp_path / name).write_text("mine")
    (tmp_path / "config.json").write_text(config)
    before = contents(tmp_path)
    assert "config.json of no run" in refused(tmp_path, EXPERIMENT, fresh=True)
    with holding(tmp_path):  # `train` does this first; it must not leave our mark in the folder
        assert "config.json of no run" in refused(tmp_path, EXPERIMENT, fresh=True)
    assert contents(tmp_path) == before and not (tmp_path / MARK).exists()


def test_fresh_spares_strangers_among_the_stages(full):
    for name in ("stages", "checkpoints"):
        (full.path / name / "thesis.txt").write_text("mine")
    assert full.is_trained()
    open_run(full.path, EXPERIMENT, fresh=True)
    assert sorted(contents(full.path)) == ["checkpoints/thesis.txt", "config.json", "notes.txt", "stages/thesis.txt"]
    assert not full.is_trained(), "a stranger's file was taken for a stage"


def test_a_removal_that_is_cut_off_anywhere_can_be_repeated(tmp_path, monkeypatch):
    cuts = 0
    for survives in range(20):
        folder = open_run(tmp_path / str(survives), EXPERIMENT)
        for name in ("stages", "checkpoints"):
            (folder.path / name / "0-a").mkdir(parents=True)
            for number in range(3):
                (folder.path / name / "0-a" / str(number)).write_text("x")
        (folder.path / "results.json").write_text("{}")
        left = survives

        def cut(real, *args, **options):
            nonlocal left
            left -= 1
            if left < 0:
                raise KeyboardInterrupt
            return real(*args, **options)

        with monkeypatch.context() as patch:
            for name in ("unlink", "rename", "rmdir"):
                patch.setattr(os, name, partial(cut, getattr(os, name)))
            try:
                open_run(folder.path, OTHER, fresh=True)
            except KeyboardInterrupt:
                cuts += 1
        half = [p for p in folder.path.glob("stages/*") if len(list(p.iterdir())) < 3]
        assert not half, "half a snapshot has its final name"
        open_run(folder.path, OTHER, fresh=True)
        assert sorted(contents(folder.path)) == ["config.json"] and folder.experiment() == OTHER
    assert 8 < cuts < 20, "the cuts reached from the first removal to the last"


def test_a_folder_of_other_files_is_refused_and_left_alone(tmp_path):
    (tmp_path / "thesis.tex").write_text("mine")
    for fresh in (False, True):
        assert "thesis.tex" in refused(tmp_path, EXPERIMENT, fresh=fresh)
    assert contents(tmp_path) == {"thesis.tex": b"mine"}


def test_a_run_without_its_config_is_refused(full):
    full.config_file.unlink()
    assert "and no run" in refused(full.path, EXPERIMENT, fresh=True)
    assert (full.path / "run.json").exists()


def test_a_start_that_was_killed_while_writing_the_config_is_no_stranger(tmp_path):
    (tmp_path / ".config.json.4711").write_text('{"cla')
    assert open_run(tmp_path, EXPERIMENT).experiment() == EXPERIMENT


def test_fresh_spares_the_model_folder_of_another_tool(tmp_path):
    """Checks a Hugging Face folder, which has a config.json and a tokenizer.json too."""
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    (tmp_path / "tokenizer.json").write_text("{}")
    (tmp_path / "model.safetensors").write_text("weights")
    before = contents(tmp_path)
    assert "describes no experiment" in refused(tmp_path, EXPERIMENT)
    assert "model.safetensors" in refused(tmp_path, EXPERIMENT, fresh=True)
    assert contents(tmp_path) == before


BROKEN = {
    "cut off": '{"class": "mllm',
    "empty": "",
    "a list": "[1]",
    "no class": "{}",
    "a class that is a number": '{"class": 5}',
    "another config": '{"class": "mllm_jax.training.config:AdamW"}',
}


@pytest.mark.parametrize("text", BROKEN.values(), ids=BROKEN)
def test_a_broken_config_is_refused_and_fresh_starts_over(tmp_path, text):
    folder = open_run(tmp_path, EXPERIMENT)
    folder.config_file.write_text(text)
    assert str(folder.config_file) in refused(tmp_path, EXPERIMENT)
    with pytest.raises(RunFolderError, match="config.json"):
        folder.experiment()
    assert folder.config_file.read_text() == text
    assert open_run(tmp_path, EXPERIMENT, fresh=True).experiment() == EXPERIMENT


@pytest.mark.parametrize("change", [{"stages": 3}, {"model": [1]}, {"stages": [{"class": 5}]}, {"nonfinite": "go on"}])
def test_a_config_with_a_part_that_is_none_is_refused(tmp_path, change):
    folder = open_run(tmp_path, EXPERIMENT)
    folder.config_file.write_text(json.dumps(json.loads(folder.config_file.read_text()) | change))
    with pytest.raises((RunFolderError, ConfigError)):
        folder.experiment()


def test_no_run_is_refused(tmp_path):
    with pytest.raises(RunFolderError, match="no config.json"):
        RunFolder(tmp_path / "nowhere").experiment()


# ---- files that cannot be written


def test_a_folder_below_a_file_is_refused(tmp_path):
    (tmp_path / "file").write_text("mine")
    assert "Not a directory" in refused(tmp_path / "file" / "run", EXPERIMENT)
    assert "File exists" in refused(tmp_path / "file", EXPERIMENT)


@pytest.mark.skipif(not Path("/proc/self").is_dir(), reason="no /proc, in which nobody can make a folder")
def test_a_file_system_that_cannot_be_written_is_refused():
    assert "can be written" in refused(Path("/proc/mllm_jax_run"), EXPERIMENT)


@pytest.mark.parametrize("number", [errno.EACCES, errno.EROFS, errno.ENOSPC])
@pytest.mark.parametrize("where", ["open", "fsync", "replace"])
def test_a_config_that_cannot_be_written_is_refused_whole(tmp_path, monkeypatch, number, where):
    folder = open_run(tmp_path, EXPERIMENT)

    def fail(*args, **options):
        raise OSError(number, os.strerror(number))

    with monkeypatch.context() as patch:
        patch.setattr(Path if where == "open" else os, where, fail)
        assert os.strerror(number) in refused(tmp_path, SAME)
    assert folder.experiment() == EXPERIMENT, "the old config is lost"
    assert {p.name for p in tmp_path.iterdir()} == {"config.json", MARK}, "a temporary file is left"


def test_a_host_that_does_not_see_the_first_ones_folder_is_refused_and_changes_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(run_folder, "first_alone", lambda work: None)  # as on a host with another disk
    with pytest.raises(RunFolderError, match="does not see"):
        open_run(tmp_path / "run", EXPERIMENT)
    assert not (tmp_path / "run").exists()


def test_json_files_come_back_or_are_refused(tmp_path):
    path = tmp_path / "run.json"
    write_json(path, {"a": [1, None, "ü"]})
    assert read_json(path) == {"a": [1, None, "ü"]}
    with pytest.raises(RunFolderError, match="holds a dict"):
        read_json(path, list)
    path.write_bytes(b"\xff\xfe{")
    with pytest.raises(RunFolderError, match=r"run\.json"):
        read_json(path)


def test_words_of_a_run_with_a_language_models_own_tokenizer_are_compared(tmp_path):
    """Checks that a part of such a run keeps its tokenizer, and that the refusal names the tokenizer's folder."""
    trained = open_run(tmp_path / "run", EXPERIMENT)
    byte_tokenizer().save(trained.processor_folder)
    source = Pretrained("llm", str(trained.path), stage="a")
    require_words(dataclasses.replace(EXPERIMENT, pretrained=(source,)), byte_tokenizer())
    other = Tokenizer.train(["a cat"], 300)
    with pytest.raises(ConfigError, match="llm of .* with another tokenizer") as refusal:
        require_words(dataclasses.replace(EXPERIMENT, pretrained=(source,)), other)
    assert f"folder={str(trained.processor_folder)!r}" in refusal.value.todo
