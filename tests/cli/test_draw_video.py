"""`mllm generate` with a Zeroscope: a file of a video, and its absence without PyAV."""

from __future__ import annotations

import json
import sys

import numpy as np
import pytest
import tiny_diffusion as tiny

from mllm_jax.cli import main
from mllm_jax.generation.assistant import Assistant

UNET = dict(tiny.SMALL["unet"], down_block_types=("DownBlock3D",), up_block_types=("UpBlock3D",))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("models") / "zeroscope"
    tiny.write(path, **tiny.SMALL | dict(unet=UNET), video=True)
    return path


def test_a_video(folder, tmp_path, capsys):
    """Checks the file's frames, rate and metadata, and its printed path."""
    av = pytest.importorskip("av")
    how = ["--frames", "3", "--steps", "2", "--guidance", "3", "--height", "16", "--width", "24", "--seed", "5"]
    assert main(["generate", str(folder), "A red cat!", *how, "--out", str(tmp_path)]) == 0
    path = tmp_path / "a-red-cat-5.mp4"
    assert capsys.readouterr().out == f"{path}\n" and list(tmp_path.iterdir()) == [path]
    asked = dict(frames=3, steps=2, guidance_scale=3.0, height=16, width=24, seed=5, on_step=lambda *_: None)
    wanted = Assistant.load(folder).draw("A red cat!", **asked)[0].media[0].array
    with av.open(str(path)) as container:
        found = np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])
        assert container.streams.video[0].average_rate == 8
        about = json.loads(container.metadata["comment"])
    assert found.shape == wanted.shape == (3, 16, 24, 3)
    grey = found.mean(axis=-1) / 255, wanted.mean(axis=-1)  # colours have half the size in the file
    assert np.abs(grey[0] - grey[1]).mean() < 0.05 < np.abs(grey[0] - grey[1][::-1]).mean()
    assert about["prompt"] == "A red cat!" and about["frames"] == "3" and about["seed"] == "5"


def test_without_pyav(folder, tmp_path, capsys, monkeypatch):
    """Checks that the missing package is named before anything is drawn."""
    monkeypatch.setitem(sys.modules, "av", None)
    assert main(["generate", str(folder), "a cat", "--out", str(tmp_path / "out")]) == 2
    assert "pip install 'mllm-jax[media]'" in capsys.readouterr().err and not (tmp_path / "out").exists()


def test_what_is_refused(folder, capsys):
    assert main(["generate", str(folder), "a cat", "--start-image", "none.png"]) == 2
    assert "none.png" in capsys.readouterr().err
    assert main(["generate", str(folder), "a cat", "--frames", "0"]) == 2
    assert "frames=0" in capsys.readouterr().err
