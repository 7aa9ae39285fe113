"""`mllm generate` with a Stable Diffusion: files, their metadata, and options that belong to another kind of model."""

from __future__ import annotations

import re

import numpy as np
import pytest
import soundfile
import tiny_audioldm2
import tiny_diffusion as tiny
from PIL import Image
from tiny_language import write_folder

import mllm_jax
from mllm_jax.checkpoints.fingerprint import short_fingerprint
from mllm_jax.cli import main
from mllm_jax.generation.assistant import Assistant


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("models") / "sd"
    tiny.write(path, **tiny.SMALL)
    return path


HOW = ["--negative", "blurry", "--steps", "3", "--guidance", "3", "--seed", "3", "--height", "16", "--width", "24"]


def test_images_and_their_metadata(folder, tmp_path, capsys):
    """Checks the files, the printed paths, the text in a PNG, and that a second command replaces nothing."""
    out = tmp_path / "made" / "here"
    command = ["generate", str(folder), "A red cat, on the sofa!", *HOW, "--count", "2", "--out", str(out)]
    assert main(command) == 0
    shown = capsys.readouterr()
    paths = [out / "a-red-cat-on-the-sofa-3.png", out / "a-red-cat-on-the-sofa-4.png"]
    assert shown.out.splitlines() == [str(path) for path in paths] and sorted(out.iterdir()) == paths
    assert "4/4 steps" in shown.err
    assistant = Assistant.load(folder)
    how = dict(negative="blurry", steps=3, guidance_scale=3, seed=3, count=2, height=16, width=24)
    answers = assistant.draw("A red cat, on the sofa!", **how, on_step=lambda *_: None)
    for seed, path, answer in zip((3, 4), paths, answers, strict=True):
        image = Image.open(path)
        wanted = (255 * answer.media[0].array).round()
        assert image.size == (24, 16) and np.abs(np.asarray(image).astype(int) - wanted).max() <= 1
        assert image.text == {
            "prompt": "A red cat, on the sofa!",
            "negative": "blurry",
            "seed": str(seed),
            "steps": "3",
            "guidance": "3",
            "scheduler": "PNDMScheduler",
            "size": "24x16",
            "model": short_fingerprint(assistant.params),
            "version": f"mllm_jax {mllm_jax.__version__}",
        }
    before = paths[0].read_bytes()
    how = ["--start-image", str(paths[0]), "--strength", "0.7", "--steps", "3", "--scheduler", "ddim", "--seed", "3"]
    assert main(["generate", str(folder), "A red cat, on the sofa!", *how, "--out", str(out)]) == 0
    second = out / "a-red-cat-on-the-sofa-3-2.png"
    assert capsys.readouterr().out == f"{second}\n" and paths[0].read_bytes() == before
    found = Image.open(second)
    assert found.text["strength"] == "0.7" and found.text["scheduler"] == "DDIMScheduler" and found.size == (24, 16)
    assert re.fullmatch("[0-9a-f]{16}", found.text["model"])


@pytest.mark.parametrize(
    "more, named",
    [
        (["--image", "a.png"], "--image for a model that draws"),
        (["--max-new-tokens=5"], "--max-new-tokens for a model that draws"),
        (["--temperature", "1"], "--temperature for a model that draws"),
        (["--no-stats"], "--no-stats for a model that draws"),
        (["--scheduler", "heun"], "--scheduler heun"),
        (["--start-image", "none.png"], "none.png"),
        (["--height", "30"], "the nearest is 32"),
        (["--strength", "0.5"], "without a start image"),
    ],
)
def test_what_a_drawing_model_refuses(folder, more, named, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["generate", str(folder), "a cat", *more]) == 2
    assert named in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_what_a_text_model_refuses(tmp_path, capsys):
    model = write_folder(tmp_path / "llm")
    for more in (["--steps", "20"], ["--guidance=3"], ["--start-image", "a.png"], ["--negative", "dog"]):
        assert main(["generate", str(model), "a cat", *more]) == 2
        assert f"{more[0].partition('=')[0]} for a model that writes text" in capsys.readouterr().err


def test_a_long_text_is_no_folder(capsys):
    assert main(["generate", "nowhere-to-be-found", "a cat " * 100]) == 2
    assert "nowhere-to-be-found: no config.json" in capsys.readouterr().err


def test_help(folder, capsys):
    for arguments, option in ((["generate", str(folder), "--help"], "--negative"), (["generate", "--help"], "--image")):
        with pytest.raises(SystemExit):
            main(arguments)
        assert option in capsys.readouterr().out


def test_sounds(tmp_path, capsys):
    """Checks the file that an AudioLDM-2 writes, and an option that only images have."""
    tiny_audioldm2.write(tmp_path / "model")
    command = ["generate", str(tmp_path / "model"), "A bell", "--steps", "2", "--out", str(tmp_path / "out")]
    assert main([*command, "--seconds", "0.1"]) == 0
    path = tmp_path / "out" / "a-bell-0.wav"
    assert capsys.readouterr().out == f"{path}\n"
    samples, rate = soundfile.read(path)
    assert (samples.shape, rate) == ((100,), 1000) and np.abs(samples).max() > 0.01
    assert main([*command, "--height", "16"]) != 0
    assert "height=16 for a model that draws sounds" in capsys.readouterr().err
