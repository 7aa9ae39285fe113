"""`mllm generate` and `mllm chat` on the folder of a language model, and of one with images."""

from __future__ import annotations

import io
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from no_torch import hide_torch
from PIL import Image
from tiny_language import write_folder
from tiny_llava import write_llava

from mllm_jax.cli import main
from mllm_jax.encoders.vit import ViTConfig, ViTDialect
from mllm_jax.generation.assistant import Assistant
from mllm_jax.models.registry import family_of_config
from mllm_jax.sharding.platform import may_have_accelerator

SAMPLED = dict(temperature=0.8, seed=3)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_folder(tmp_path_factory.mktemp("models") / "hub")


def wanted(folder) -> str:
    return Assistant.load(folder).generate("why?", max_new_tokens=8, **SAMPLED).text


def test_generate_asks_by_the_chat_template(folder, capsys):
    assert main(["generate", str(folder), "why?", "--max-new-tokens", "8", "--temperature", "0.8", "--seed", "3"]) == 0
    assert capsys.readouterr().out.strip() == wanted(folder).strip()


def test_generate_reads_what_convert_wrote(folder, tmp_path, capsys):
    assert main(["convert", str(folder), str(tmp_path / "native")]) == 0
    capsys.readouterr()
    command = ["generate", str(tmp_path / "native"), "why?", "--max-new-tokens", "8", "--temperature", "0.8"]
    assert main([*command, "--seed", "3"]) == 0
    assert capsys.readouterr().out.strip() == wanted(folder).strip()


def test_an_image_for_a_language_model_is_refused(folder, tmp_path, capsys):
    Image.new("RGB", (4, 4)).save(tmp_path / "a.png")
    assert main(["generate", str(folder), "why?", "--image", str(tmp_path / "a.png")]) == 2
    assert "for a language model" in capsys.readouterr().err


def test_chat_answers_and_leaves(folder, monkeypatch, capsys):
    typed = io.StringIO("why?\n/exit\nnever read\n")
    monkeypatch.setattr("sys.stdin", typed)
    assert main(["chat", str(folder), "--max-new-tokens", "8", "--ignore-eos", "--int8"]) == 0
    shown = capsys.readouterr().out
    assert "int8" in shown and len(shown.splitlines()) > 1 and typed.readline() == "never read\n"


def test_chat_ends_with_its_input_and_prints_answers_alone(folder, monkeypatch, capsys):
    monkeypatch.setattr("sys.stdin", io.StringIO("why?"))
    assert main(["chat", str(folder), "--max-new-tokens", "8", "--ignore-eos"]) == 0
    alone = Assistant.load(folder).generate("why?", max_new_tokens=8, ignore_eos=True).text
    assert capsys.readouterr().out.splitlines() == [*alone.splitlines(), "[cut off; --max-new-tokens allows more]"]


def test_chat_and_generate_see_images(tmp_path, monkeypatch, capsys):
    model, image = str(write_llava(tmp_path / "llava")), tmp_path / "a.png"
    Image.effect_noise((12, 9), 90).save(image)
    how = ["--max-new-tokens", "6"]
    assert main(["generate", model, "what is it ?", "--image", str(image), *how]) == 0
    about = capsys.readouterr().out.strip()
    assert main(["generate", model, "what is it ?", *how]) == 0
    assert capsys.readouterr().out.strip() != about
    monkeypatch.setattr("sys.stdin", io.StringIO(f"/image {tmp_path}/absent.png\n/image {image}\nwhat is it ?\n"))
    assert main(["chat", model, *how]) == 0
    shown = capsys.readouterr().out
    assert "absent.png cannot be read" in shown and about in shown.split("to do:")[1]


def test_a_folder_that_is_no_model_is_refused(tmp_path, capsys):
    assert main(["chat", str(tmp_path)]) == 2
    assert "config.json" in capsys.readouterr().err


def test_an_answer_that_is_cut_off_is_said_to_be(folder, capsys):
    asked = ["generate", str(folder), "why?", "--temperature", "0.8", "--seed", "3", "--max-new-tokens"]
    assert main([*asked, "2"]) == 0
    assert capsys.readouterr().err == "(cut off after 2 tokens; --max-new-tokens allows more)\n"
    assert main([*asked, "100"]) == 0
    assert re.fullmatch(r"\(cut off after 9\d tokens; the model takes no longer text\)\n", capsys.readouterr().err)


class Unread(io.StringIO):
    def readline(self, *_):
        raise AssertionError("the prompt came up")


@pytest.mark.parametrize("command", [["chat"], ["generate", "why?"]])
def test_what_writes_no_text_is_refused_before_the_prompt(tmp_path, monkeypatch, capsys, command):
    """Checks that the refusal comes also before the weights, which are absent."""
    encoder = ViTConfig(
        *(12, 4, 24),
        num_layers=2,
        num_heads=2,
        mlp_size=40,
        class_token=True,
        dialect=ViTDialect(
            norm_output=False, norm_pooled=True, pre_norm=True, patch_bias=False, family="CLIPVisionModel"
        ),
    )
    (tmp_path / "config.json").write_text(json.dumps(family_of_config(encoder).to_hf(encoder)))
    monkeypatch.setattr("sys.stdin", Unread())
    assert main([command[0], str(tmp_path), *command[1:]]) == 2
    err = capsys.readouterr().err
    assert "a CLIPVisionModel, asked for text" in err and "a language model" in err and err.count("to do: ") == 1


def test_chat_and_generate_are_silent_without_torch_and_a_tpu(folder, tmp_path):
    """Runs with libtpu installed and without PyTorch for transformers."""
    hidden = {"JAX_PLATFORMS"} if not may_have_accelerator(os.environ, Path("/dev"), ()) else set()
    environment = {name: value for name, value in os.environ.items() if name not in hidden}
    path = [str(hide_torch(tmp_path / "hidden")), str(Path(__file__).parents[1])]
    environment["PYTHONPATH"] = os.pathsep.join(path)
    for command, typed in ((["chat"], "why?\n/exit\n"), (["generate"], None)):
        words = [*command, str(folder), *([] if typed else ["why?"]), "--max-new-tokens", "4"]
        done = subprocess.run(
            [sys.executable, "-m", "mllm_jax.cli", *words],
            **({"input": typed} if typed else {"stdin": subprocess.DEVNULL}),
            env=environment,
            capture_output=True,
            text=True,
        )
        noise = done.stderr.removesuffix("(cut off after 4 tokens; --max-new-tokens allows more)\n")
        assert (done.returncode, noise) == (0, "") and done.stdout
