"""`mllm generate` and `mllm chat` with a model that also draws, and their options."""

from __future__ import annotations

from pathlib import Path

import pytest
from tiny_drawing import drawing_model
from toy_data import MODEL

from mllm_jax.cli.media import MediaOptions, free_name, with_paths
from mllm_jax.errors import ConfigError


def test_options_of_media_are_refused_without_them(tmp_path):
    with pytest.raises(ConfigError, match="--produce, --steps, --out for a model that writes text alone"):
        MediaOptions(produce=("image",), steps=3).check(MODEL, tmp_path)
    MediaOptions().check(MODEL, None)
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="which is a file"):
        MediaOptions().check(drawing_model(), tmp_path / "file")


def test_names_and_places_of_files(tmp_path):
    first = free_name(tmp_path, "A red cat!", "3")
    first.write_text("")
    assert first.name == "a-red-cat-3.png" and free_name(tmp_path, "A red cat!", "3").name == "a-red-cat-3-2.png"
    text = "see <image 1>, hear <audio 1>, see <image 2>"
    paths = [("image", Path("a.png")), ("audio", Path("b.wav")), ("image", Path("c.png"))]
    assert with_paths(text, paths) == "see a.png, hear b.wav, see c.png"
