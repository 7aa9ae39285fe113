"""`mllm data suggest`: the table, the line to paste, and refusals."""

from __future__ import annotations

import re
from dataclasses import dataclass

import pytest
from toy_data import Toy

from mllm_jax.cli import data, main
from mllm_jax.errors import DataError

CONFIG = """
from dataclasses import replace
from test_cli_data import Half
from toy_data import MODEL, IMAGES, Toy
from mllm_jax import Experiment, NextToken, Stage, TokenizerConfig, Weighted


def config():
    stage = Stage("first", NextToken(), ("*",), replace(IMAGES, rows=8, length=64), 1)
    broken = replace(stage, name="second", data=replace(IMAGES, sources=(Weighted(Half()),)))
    return Experiment("suggested", MODEL, (stage, broken), TokenizerConfig(320))
"""


@dataclass(frozen=True)
class Half:
    """A source with half of its records unreadable."""

    def build(self):
        return HalfSource(Toy("half", size=40).build())


class HalfSource:
    name = "half"

    def __init__(self, good):
        self.good = good

    def __len__(self) -> int:
        return len(self.good)

    def example(self, index: int):
        if index % 2:
            raise DataError("a torn record", "a whole one", "correct it")
        return self.good.example(index)

    def fingerprint(self) -> str:
        return "half"


@pytest.fixture
def config(tmp_path):
    path = tmp_path / "suggested.py"
    path.write_text(CONFIG)
    return path


def test_suggest(config, capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    assert main(["data", "suggest", str(config), "--sample", "60"]) == 0
    out = capsys.readouterr().out
    assert "stage first: 60 examples measured" in out
    assert "stage second: 20 examples measured" in out and "20 more cannot be used, the first: half[1]: a torn" in out
    tables = out.split("stage second")
    for number, table in enumerate(tables):
        assert table.count("proposed") == 1 and table.count("now") == 1 and "images" in table
        pasted = re.search(r"Mixture\(\.\.\., rows=(\d+), length=(\d+), slots=\{'image': (\d+)\}\)", table)
        rows, length, slots = map(int, pasted.groups())
        assert 0.5 < rows * length / (8 * 64) < 2 and slots >= 2 - number
        assert f"--stages.{number}.data.rows {rows} --stages.{number}.data.length {length}" in table
        row = next(line for line in table.splitlines() if "proposed" in line)
        assert f"{length}" in row and float(re.findall(r"([\d.]+) %", row)[0]) > 80
    assert sorted(path.name for path in tmp_path.iterdir() if path.suffix != ".py") in ([], ["__pycache__"])


@pytest.mark.parametrize(
    "arguments,match",
    [
        (["data", "sugest", "c.py"], "mllm data sugest"),
        (["data", "suggest"], "without a config"),
        (["data", "suggest", "{config}", "--sample", "0"], "sample 0"),
        (["data", "suggest", "{config}", "--stage", "third"], "first, second"),
    ],
)
def test_refusals(config, arguments, match, capsys):
    assert main([argument.format(config=config) for argument in arguments]) == 2
    assert match in capsys.readouterr().err


def test_help(capsys):
    assert main(["data"]) == main(["data", "suggest", "--help"]) == 0
    assert capsys.readouterr().out.count(data.USAGE) == 2
