"""`mllm evaluate --questions` on every kind of model folder."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import toy_data
from PIL import Image
from tiny_language import write_folder
from tiny_llava import write_llava

import mllm_jax
from mllm_jax import Experiment, Mixture, NextToken, Pretrained, Stage, TokenizerConfig, Weighted
from mllm_jax.cli import main
from mllm_jax.training.loop import train

DATA = Mixture((Weighted(toy_data.Toy()),), rows=2, length=64, slots={"image": 2})
STAGE = Stage("align", NextToken(), ("projector_image/*",), DATA, steps=1)


@pytest.fixture(scope="module", autouse=True)
def quickly():
    with toy_data.quick_compilation():
        yield


@pytest.fixture(scope="module")
def questions(tmp_path_factory):
    """Returns a file of three questions about images, one with choices, beside the folder of images."""
    folder = tmp_path_factory.mktemp("asked")
    (folder / "media").mkdir()
    rng = np.random.default_rng(0)
    for name in "abc":
        Image.fromarray(rng.integers(0, 256, (9, 12, 3), np.uint8)).save(folder / "media" / f"{name}.png")
    records = [{"id": name, "question": "what is it ?", "image": f"{name}.png", "answer": "a cat"} for name in "abc"]
    records[1] |= {"choices": ["a cat", "a dog"], "answer": "B"}
    (folder / "own.json").write_text(json.dumps(records))
    return folder / "own.json"


@pytest.fixture(scope="module")
def llava(tmp_path_factory):
    return write_llava(tmp_path_factory.mktemp("models") / "llava")


def trained(folder: Path, model, **options) -> Path:
    return train(Experiment("own", model, (STAGE,), log_every=1, **options), folder).path


def answered(folder: Path, questions: Path, out: Path, *more: str) -> list[dict]:
    command = ["evaluate", str(folder), "--questions", str(questions), "--out", str(out), *more]
    assert main(command) == 0
    lines = [json.loads(line) for line in (out / "predictions.jsonl").read_text().splitlines()]
    (found,) = json.loads((out / "results.json").read_text()).values()
    assert found["n"] == len(lines) and found["accuracy"] == np.mean([line["correct"] for line in lines])
    return lines


def check_images(folder: Path, questions: Path, tmp_path: Path, capsys) -> list[dict]:
    """Returns the answers after checking the printed output."""
    lines = answered(folder, questions, tmp_path / "out", "--media", str(questions.parent / "media"))
    shown = " ".join(capsys.readouterr().out.split())
    assert "own" in shown and "shuffled media" in shown and str(tmp_path / "out" / "predictions.jsonl") in shown
    assert [line["id"] for line in lines] == ["a", "b", "c"]
    assert [line["reference"] for line in lines] == ["a cat", "B. a dog", "a cat"]
    return lines


def test_a_run_from_scratch(questions, tmp_path, capsys):
    run = trained(tmp_path / "run", toy_data.MODEL, tokenizer=TokenizerConfig(vocab_size=320))
    check_images(run, questions, tmp_path, capsys)
    assert not (run / "results.json").exists() and not (run / "predictions.jsonl").exists()
    # It has no tasks of its own, and its folder is not for the answers to other questions.
    assert main(["evaluate", str(run)]) == 2
    assert "give --questions FILE" in " ".join(capsys.readouterr().err.split())
    assert main(["evaluate", str(run), "--questions", str(questions), "--out", str(run)]) == 2
    assert "a run's folder" in capsys.readouterr().err


def test_a_run_of_a_llava(llava, questions, tmp_path, capsys):
    options = dict(tokenizer=TokenizerConfig(folder=str(llava)), pretrained=(Pretrained("*", str(llava)),))
    run = trained(tmp_path / "run", mllm_jax.pretrained_config(llava), **options)
    check_images(run, questions, tmp_path, capsys)


def test_a_llava_folder(llava, questions, tmp_path, capsys):
    lines = check_images(llava, questions, tmp_path, capsys)
    first = mllm_jax.Assistant.load(llava, by_layer=False).generate(
        [{"role": "user", "content": [{"type": "image", "path": str(questions.parent / "media" / "a.png")},
                                      {"type": "text", "text": "what is it ?"}]}], max_new_tokens=32
    )  # fmt: skip
    assert lines[0]["answer"] == first.text
    assert main(["evaluate", str(llava)]) == 2
    assert "a model's folder, without questions" in capsys.readouterr().err
    more = ("--media", str(questions.parent / "media"), "--limit", "2")
    assert answered(llava, questions, tmp_path / "two", *more) == lines[:2]


def test_a_language_models_folder(questions, tmp_path, capsys):
    folder = write_folder(tmp_path / "llm")
    words = tmp_path / "words.jsonl"
    words.write_text('{"question": "why?", "answer": "so"}\n{"question": "who?", "answer": ["you", "me"]}\n')
    lines = answered(folder, words, tmp_path / "out")
    assert [line["question"] for line in lines] == ["why?", "who?"]
    assert "shuffled" not in capsys.readouterr().out
    assert (
        main(["evaluate", str(folder), "--questions", str(questions), "--media", str(questions.parent / "media")]) == 2
    )
    assert "for a language model" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--limit", "2"], "--limit without --questions"),
        (["--media", "m", "--out", "o"], "--media, --out without --questions"),
        (["--questions", "own.json", "--tasks", "a"], "--tasks with --questions"),
        (["--questions", "own.json", "--limit", "0"], "limit 0"),
        (["--questions", "absent.json"], "absent.json cannot be read"),
    ],
)
def test_what_does_not_go_together_is_refused(tmp_path, capsys, options, message):
    assert main(["evaluate", str(tmp_path), *options]) == 2
    assert message in " ".join(capsys.readouterr().err.split())
