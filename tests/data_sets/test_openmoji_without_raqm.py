"""The emoji data set by a Pillow without raqm: fewer images, kept apart, with which a run trains and is evaluated."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import jax
import pytest
from PIL import features

from mllm_jax.data.pipeline import Weighted
from mllm_jax.datasets.openmoji import OpenMojiQuestions, load, records
from mllm_jax.datasets.openmoji.catalog import catalog
from mllm_jax.datasets.openmoji.openmoji_dataset_builder import Builder
from mllm_jax.errors import DataError, TooFewError
from mllm_jax.evaluation.run import evaluate_run
from mllm_jax.evaluation.tasks.openmoji import openmoji_questions, openmoji_retrieval, openmoji_skills
from mllm_jax.training.config_file import load_config
from mllm_jax.training.loop import train

SMOKE = Path(__file__).parents[2] / "configs" / "smoke.py"
SAID = "415 of its 1,062 emoji"


def forget():
    records._load.cache_clear()
    catalog.cache_clear()


@pytest.fixture(scope="module")
def remove_raqm():
    """Returns a function that hides raqm until its MonkeyPatch is undone."""
    check = features.check
    assert check("raqm"), "the suite needs Pillow's own wheel"

    def remove(patch: pytest.MonkeyPatch) -> None:
        patch.setattr(features, "check", lambda name: name != "raqm" and check(name))

    return remove


@pytest.fixture(scope="module")
def without(remove_raqm, tmp_path_factory):
    """Returns the folder of the quickstart's data drawn without raqm, which is the default folder meanwhile."""
    folder = tmp_path_factory.mktemp("data")
    forget()
    with pytest.MonkeyPatch.context() as patch:
        remove_raqm(patch)
        patch.setenv("MLLM_DATA_DIR", str(folder))
        load("quickstart")
        yield folder
    forget()


def test_fewer_images_are_drawn_said_once_and_kept_apart(remove_raqm, tmp_path, capsys):
    def found(folder: str = str(tmp_path)):
        forget()
        fingerprint = OpenMojiQuestions(data_dir=folder).build().fingerprint()
        return load("quickstart", folder), fingerprint, capsys.readouterr().err

    with pytest.MonkeyPatch.context() as patch:
        remove_raqm(patch)
        few, of_few, said = found()
        assert said.count(SAID) == 1 and "--only-binary=:all: pillow" in said and said.count("\n") == 1
        assert found() == (few, of_few, ""), "another, or said again"
    kept = [path.parent.name for path in (tmp_path / "openmoji").glob(f"*/{Builder.VERSION}")]
    assert kept == ["quickstart_simple"]
    whole, of_whole, said = found()
    assert said == "" and of_whole != of_few
    with pytest.MonkeyPatch.context() as patch:
        remove_raqm(patch)
        assert found() == (whole, of_whole, ""), "prepared data does not depend on raqm"

    assert [len(rows) for rows in few.values()] == [367, 0, 0, 48] and all(whole.values())
    images = {row.codepoints: row for rows in whole.values() for row in rows}
    assert all(images[row.codepoints] == row for rows in few.values() for row in rows), "drawn differently"
    drawn = {row.codepoints for rows in few.values() for row in rows}
    assert drawn == {code for code in images if "-" not in code.removesuffix("-FE0F")}


def test_the_whole_data_set_is_not_prepared_without_raqm(remove_raqm, monkeypatch, tmp_path):
    remove_raqm(monkeypatch)
    builder = Builder(config="quickstart", data_dir=tmp_path)
    with pytest.raises(DataError, match=r"(?s)without raqm.*--only-binary=:all: pillow"):
        builder.download_and_prepare(file_format="array_record")
    assert not Path(builder.data_dir).exists()


def test_tasks_have_questions_or_say_why_not(without):
    enough, few = {}, {}
    for task in (*openmoji_questions(image_size=16, limit=6), *openmoji_skills(image_size=16, limit=6)):
        try:
            enough[task.name] = task.examples()
        except TooFewError as error:
            few[task.name] = str(error)
    assert {name.partition("/")[0] for name in few} == {"validation", "composition"}
    assert all("has no images" in said and "without raqm" not in said for said in few.values())
    assert {name.partition("/")[0] for name in enough} == {"unseen", "new"}
    assert {"unseen/naming", "unseen/scene3_exists", "new/top_left"} <= set(enough) and all(enough.values())
    for task in openmoji_retrieval(splits=("composition",)):
        with pytest.raises(TooFewError, match="openmoji/quickstart/composition has no images"):
            task.measure(None)


@pytest.fixture(scope="module")
def experiment():
    """Returns the last stage of configs/smoke.py on less data, with three tasks."""
    smoke = load_config(SMOKE)
    tasks = {task.name: task for task in smoke.evaluation}
    chosen = tuple(tasks[name] for name in ("composition/naming", "unseen/naming", "unseen/gender"))
    stage = replace(smoke.stages[-1], steps=2, validate_every=1, evaluate_every=2, evaluate=("composition/naming",))
    less = Weighted(OpenMojiQuestions(image_size=16, variants=1, per_base=1))
    stage = replace(stage, data=replace(stage.data, sources=(less,)))
    return replace(smoke, evaluation=chosen, stages=(stage,))


def test_a_run_trains_and_is_evaluated(without, experiment, tmp_path, capsys):
    train(experiment, tmp_path, devices=jax.devices()[:1])
    trained = capsys.readouterr().out.replace("\n", " ")
    results = evaluate_run(tmp_path, devices=jax.devices()[:1])
    assert "no validation loss: openmoji/quickstart/validation has no images" in trained
    assert "step 2: left out composition/naming" in trained
    assert list(results) == ["unseen/naming"] and results["unseen/naming"]["n"] == 8
    one, other = [line for line in capsys.readouterr().out.splitlines() if line.startswith("left out")]
    assert "composition/naming: openmoji/quickstart/composition has no images" in one
    assert "unseen/gender: shuffled media of 1 example(s)" in other
    with pytest.raises(TooFewError, match="composition has no images"):
        evaluate_run(tmp_path, tasks=["composition"], devices=jax.devices()[:1])


def test_early_stopping_needs_validation_data(without, experiment, tmp_path):
    stage = replace(experiment.stages[0], patience=1)
    with pytest.raises(TooFewError, match="openmoji/quickstart/validation has no images"):
        train(replace(experiment, stages=(stage,)), tmp_path, devices=jax.devices()[:1])
