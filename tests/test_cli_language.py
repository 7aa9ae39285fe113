"""`mllm generate` and `mllm chat` on a language model's folder."""

from __future__ import annotations

import io

import pytest
from PIL import Image
from tiny_language import write_folder

from mllm_jax.cli import main
from mllm_jax.inference.language import LanguageGenerator
from mllm_jax.inference.options import Options
from mllm_jax.inference.sampling import Sampling

SAMPLED = Sampling(temperature=0.8, seed=3)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_folder(tmp_path_factory.mktemp("models") / "hub")


def wanted(folder, sampling=SAMPLED) -> str:
    generator = LanguageGenerator.load(folder)
    return generator.generate([[{"role": "user", "content": "why?"}]], Options(max_new_tokens=8), sampling)[0].text


def test_generate_asks_by_the_chat_template(folder, capsys):
    assert main(["generate", str(folder), "why?", "--max-new-tokens", "8", "--temperature", "0.8", "--seed", "3"]) == 0
    assert capsys.readouterr().out.strip() == wanted(folder).strip()


def test_generate_reads_what_convert_wrote(folder, tmp_path, capsys):
    assert main(["convert", str(folder), str(tmp_path / "native")]) == 0
    capsys.readouterr()
    command = ["generate", str(tmp_path / "native"), "why?", "--max-new-tokens", "8", "--temperature", "0.8"]
    assert main([*command, "--seed", "3"]) == 0
    assert capsys.readouterr().out.strip() == wanted(folder).strip()


def test_a_picture_for_a_language_model_is_refused(folder, tmp_path, capsys):
    Image.new("RGB", (4, 4)).save(tmp_path / "a.png")
    assert main(["generate", str(folder), "why?", "--image", str(tmp_path / "a.png")]) == 2
    assert "words only" in capsys.readouterr().err


def test_chat_answers_and_leaves(folder, monkeypatch, capsys):
    typed = io.StringIO("why?\n/exit\nnever read\n")
    monkeypatch.setattr("sys.stdin", typed)
    assert main(["chat", str(folder), "--max-new-tokens", "8", "--ignore-eos", "--int8"]) == 0
    shown = capsys.readouterr().out
    assert "int8" in shown and len(shown.splitlines()) > 2 and typed.readline() == "never read\n"


def test_a_folder_that_is_no_model_is_refused(tmp_path, capsys):
    assert main(["chat", str(tmp_path)]) == 2
    assert "no tokenizer in" in capsys.readouterr().err
