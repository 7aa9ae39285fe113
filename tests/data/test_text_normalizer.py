"""Whisper's normalisers with the table of spellings of a folder or of a package, and refused without one."""

from __future__ import annotations

import json
import sys

import pytest
from transformers.models.whisper.english_normalizer import BasicTextNormalizer, EnglishTextNormalizer

from mllm_jax.checkpoints.description import describe, rebuild
from mllm_jax.data.processing.text_normalizer import BasicNormalizer, EnglishNormalizer
from mllm_jax.errors import DataError
from mllm_jax.evaluation.metrics import ErrorRate

TABLE = {"colour": "color", "centre": "center"}
TEXTS = [
    "Mr. Neill won't pay $20 million, um, for the colour!",
    "It's twenty-one [noise] o'clock (sharp)",
    "",
    "Ünïcode",
]


@pytest.fixture
def no_package(monkeypatch):
    """Hides the package, should it be installed."""
    monkeypatch.setitem(sys.modules, "whisper_normalizer", None)


@pytest.fixture
def package(tmp_path, monkeypatch):
    """Installs a package of the name, which must not be imported."""
    place = tmp_path / "site" / "whisper_normalizer"
    (place / "normalizers").mkdir(parents=True)
    (place / "__init__.py").write_text("raise RuntimeError('imported')\n")
    (place / "normalizers" / "english.json").write_text(json.dumps({"colour": "of the package"}))
    monkeypatch.delitem(sys.modules, "whisper_normalizer", raising=False)
    monkeypatch.syspath_prepend(place.parent)


def test_english_with_the_table_of_the_folder(tmp_path, package):
    (tmp_path / "normalizer.json").write_text(json.dumps(TABLE))
    ours, theirs = EnglishNormalizer(str(tmp_path)), EnglishTextNormalizer(TABLE)
    for text in TEXTS:
        assert ours(text) == theirs(text).strip()
    assert ours(TEXTS[0]) == "mister neill will not pay $20000000 for the color"


@pytest.mark.parametrize("folder", [True, False])
def test_english_with_the_table_of_the_package(folder, tmp_path, package):
    ours = EnglishNormalizer(str(tmp_path) if folder else None)
    assert ours("The Colour.") == "the of the package"


def test_english_without_a_table_is_refused(tmp_path, no_package):
    for folder in (None, str(tmp_path)):
        with pytest.raises(DataError, match="pip install whisper-normalizer") as refused:
            EnglishNormalizer(folder)
        assert "normalizer.json" in str(refused.value)
    for content, message in (
        ("{}", "0 entries"),
        ('{"a": 1}', "1 entries"),
        ("[]", "object"),
        ("{", "normalizer.json"),
    ):
        (tmp_path / "normalizer.json").write_text(content)
        with pytest.raises(DataError, match=message):
            EnglishNormalizer(str(tmp_path))


@pytest.mark.parametrize("options", [(), (True,), (False, True)])
def test_basic_equals_transformers(options, no_package):
    ours, theirs = BasicNormalizer(*options), BasicTextNormalizer(*options)
    for text in TEXTS:
        assert ours(text) == theirs(text).strip()
    assert BasicNormalizer()("  Hällo, [Lärm] Welt! ") == "hällo welt"


def test_a_config_can_name_them(tmp_path):
    (tmp_path / "normalizer.json").write_text(json.dumps(TABLE))
    for normalise in (BasicNormalizer(split_letters=True), EnglishNormalizer(str(tmp_path))):
        metric = ErrorRate("character", normalise)
        assert rebuild(json.loads(json.dumps(describe(metric)))) == metric
