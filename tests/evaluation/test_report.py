"""The report: one valid page with the run's numbers, safe against malicious content."""

from __future__ import annotations

import base64
import io
import json
import math
import os
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
from PIL import Image
from rich.console import Console

import mllm_jax
from mllm_jax.errors import DataError, RunFolderError
from mllm_jax.evaluation.charts import Line, chart, ema
from mllm_jax.evaluation.report import write_report
from mllm_jax.evaluation.tables import table
from mllm_jax.training.operations.goodput import KINDS

VOID = {"meta", "img", "input", "br"}
SVG = {"line", "rect", "polyline", "circle"}
RESULTS = {
    "composition/naming": {"accuracy": 0.6312, "accuracy_shuffled_media": 0.021, "majority": 0.013, "n": 1187},
    "composition/skin tone": {"accuracy": 0.95, "accuracy_shuffled_media": 0.2, "majority": 0.21, "n": 400},
    "unseen/category": {"accuracy": 1.0, "accuracy_shuffled_media": None, "majority": 0.19, "n": 80},
}
RUN = {
    "config": "quickstart",
    "machine": "2 CPU cores",
    "seed": 7,
    "parameters": {"encoder": 1_200_000, "llm": 2_300_000},
    "stages": [
        {"name": "language", "steps": 60, "seconds": 75.0, "trainable_bytes": 9_437_184, "frozen_bytes": 0},
        {"name": "align", "steps": 40, "seconds": 45.0, "tokens_per_second": 12_345.6, "packing": 0.981, "note": "x<y"},
    ],
}


class Page(HTMLParser):
    """Checks that every tag is closed in order, and collects addresses, texts and classes."""

    def __init__(self, text: str):
        super().__init__()
        self.open, self.tags, self.addresses, self.text, self.ids = [], [], [], [], []
        self.feed(text)
        self.close()
        assert self.open == []
        self.all = " ".join(" ".join(self.text).split())

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        self.addresses += [value for name, value in attributes if name in ("src", "href", "action", "data", "srcset")]
        self.ids += [value for name, value in attributes if name == "id"]
        assert len(attributes) == len(dict(attributes)), f"a repeated attribute in {tag}"
        assert not [name for name, _ in attributes if name.startswith("on")]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        assert tag in SVG, f"<{tag}/> means <{tag}> in HTML"
        self.tags.append((tag, dict(attributes)))

    def handle_endtag(self, tag):
        assert self.open and self.open.pop() == tag

    def handle_data(self, data):
        if "style" not in self.open:
            self.text.append(data)

    def count(self, tag: str, css: str) -> int:
        return sum(name == tag and css in (found.get("class") or "").split() for name, found in self.tags)


def png(colour: str = "red") -> str:
    out = io.BytesIO()
    Image.new("RGB", (4, 4), colour).save(out, "PNG")
    return base64.b64encode(out.getvalue()).decode()


def example(number: int, **changed) -> dict:
    made = {
        "task": "composition/naming",
        "image_png_base64": [png()],
        "question": f"What is number {number}?",
    }
    return made | {"answer": "a cat", "reference": "a dog", "correct": number % 3 == 0} | changed


def write_metrics(folder: Path, steps: int = 100) -> None:
    lines = []
    for step in range(1, steps + 1):
        stage = "language" if step <= 60 else "align"
        values = {"loss": 4 / step, "learning_rate": 1e-3 * step / steps, "grad_norm": 1.0}
        lines.append({"step": step, "stage": stage, **values, "timing": {"seconds": 0.1}})
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def full_run(folder: Path) -> Path:
    write_metrics(folder)
    (folder / "results.json").write_text(json.dumps(RESULTS))
    (folder / "run.json").write_text(json.dumps(RUN))
    (folder / "examples.json").write_text(json.dumps([example(number) for number in range(24)]))
    return folder


def test_where_the_time_went(tmp_path):
    seconds = dict.fromkeys(KINDS, 0.0) | {"productive": 75.0, "compile": 15.0, "lost": 10.0}
    (full_run(tmp_path) / "goodput.json").write_text(json.dumps({"seconds": seconds, "starts": 3}))
    page = Page(write_report(tmp_path).read_text())
    assert "Where the time went" in page.all and "3 starts" in page.all
    assert "productive 1 min 15 s 75.0 % steps that count" in page.all
    assert "lost 10.0 s 10.0 % steps done again after a restart" in page.all
    assert "waiting for a batch" not in page.all, "kinds without time are left out"
    (tmp_path / "goodput.json").write_text('{"seconds": {}, "starts": 1}')
    with pytest.raises(DataError, match="goodput.json"):
        write_report(tmp_path)


def test_a_full_run_is_shown_whole(tmp_path):
    path = write_report(full_run(tmp_path))
    assert path == tmp_path / "report.html"
    page = Page(path.read_text())
    for shown in (
        "quickstart",
        "2 CPU cores",
        "seed",
        "63.1 %",
        "2.1 %",
        "1.3 %",
        "1,187",
        "95.0 %",
        "100.0 %",
        "± 2.7",
    ):
        assert shown in page.all, shown
    for shown in ("9.0 MiB", "0 B", "1 min 15 s", "2 min 00 s", "12.3 k", "98.1 %", "3.5 M", "x<y", "mean of 2 tasks"):
        assert shown in page.all, shown
    assert page.count("article", "card") == 24
    assert page.count("article", "right") == page.all.count("✓ right") == 8
    assert page.count("article", "wrong") == page.all.count("✗ wrong") == 16
    assert page.count("polyline", "raw") == 8  # two stages, each linear and logarithmic, and in two more curves
    assert "2 more curves" in page.all
    assert page.count("figure", "log") == page.count("figure", "linear") == 2
    assert page.count("svg", "bar") == 3
    assert "8 of these 24 are right" in page.all
    assert not list(tmp_path.glob(".report.html*"))


def test_the_page_needs_nothing_but_itself(tmp_path):
    text = write_report(full_run(tmp_path)).read_text()
    page = Page(text)
    assert len(page.addresses) == 24
    assert all(address.startswith("data:image/png;base64,") for address in page.addresses)
    assert not {"script", "link", "iframe", "object"} & {tag for tag, _ in page.tags}
    assert "@import" not in text and "url(" not in text and "http" not in text.replace("http-equiv", "")
    assert "default-src 'none'" in text and "prefers-color-scheme: dark" in text
    assert len(page.ids) == len(set(page.ids))


@pytest.mark.parametrize(("tiles", "columns"), [(1, 1), (4, 4), (5, 5), (6, 3), (7, 4), (11, 4)])
def test_no_tile_is_left_alone_in_a_row(tmp_path, tiles, columns):
    full_run(tmp_path)
    results = {f"split{i}/naming": {"accuracy": 0.5} for i in range(tiles)}
    (tmp_path / "results.json").write_text(json.dumps(results))
    (tmp_path / "metrics.jsonl").write_text("")
    (tmp_path / "run.json").write_text("{}")
    page = Page(write_report(tmp_path).read_text())
    assert page.count("div", "tile") == tiles and tiles % columns != 1
    assert ("div", {"class": "tiles", "style": f"--columns: {columns}"}) in page.tags


def test_the_page_says_what_it_was_made_from(tmp_path):
    full_run(tmp_path)
    page = Page(write_report(tmp_path).read_text())
    assert f"mllm train {tmp_path}" in page.all and "config.json" in page.all
    assert f"Written by mllm_jax {mllm_jax.__version__}" in page.all


def test_the_numbers_drawn_are_the_numbers_given(tmp_path):
    full_run(tmp_path)
    tags = Page(write_report(tmp_path).read_text()).tags
    widths = [float(found["width"]) for tag, found in tags if tag == "rect" and found["class"] == "fill"]
    assert widths == [126.2, 190.0, 200.0]
    assert [float(found["x1"]) for tag, found in tags if found.get("class") == "solid" and tag == "line"] == [4.2, 40.0]
    dashed = [float(found["x1"]) for tag, found in tags if found.get("class") == "dashed" and tag == "line"]
    assert dashed == [2.6, 42.0, 38.0]


def test_whatever_a_run_holds_is_escaped(tmp_path):
    full_run(tmp_path)
    evil = '<script>alert("x")</script>"\'&<img src=http://a.b>'
    (tmp_path / "run.json").write_text(json.dumps({"config": evil, evil: evil, "stages": [{"name": evil, evil: evil}]}))
    (tmp_path / "results.json").write_text(json.dumps({evil: {"accuracy": 0.5, evil: 4}}))
    changed = dict.fromkeys(("task", "question", "answer", "reference"), evil)
    (tmp_path / "examples.json").write_text(json.dumps([example(0, **changed)]))
    line = {"step": 1, "stage": evil, "loss": 1.0, evil: 2.0, "timing": {}}
    (tmp_path / "metrics.jsonl").write_text(json.dumps(line) + "\n")
    page = Page(write_report(tmp_path).read_text())
    assert "script" not in {tag for tag, _ in page.tags}
    assert [address[:5] for address in page.addresses] == ["data:"]
    assert page.all.count("alert") >= 12


@pytest.mark.parametrize("text", ["", "AAAA", "no base64!", '"><script>', None])
def test_an_image_that_is_none_is_refused(tmp_path, text):
    full_run(tmp_path)
    (tmp_path / "examples.json").write_text(json.dumps([example(0), example(1, image_png_base64=[text])]))
    with pytest.raises(DataError, match="entry 1"):
        write_report(tmp_path)


def test_metrics_alone_make_a_page(tmp_path):
    write_metrics(tmp_path)
    page = Page(write_report(tmp_path).read_text())
    assert page.all.count("No evaluation was made") == 2
    assert tmp_path.name in page.all
    assert "Stages" not in page.all


def test_missing_metrics_are_refused(tmp_path):
    with pytest.raises(DataError, match="metrics.jsonl"):
        write_report(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_no_step_and_half_written_lines_are_borne(tmp_path):
    (tmp_path / "metrics.jsonl").write_text("")
    assert "No step was logged" in write_report(tmp_path).read_text()
    write_metrics(tmp_path)
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 101, "sta')
    Page(write_report(tmp_path).read_text())


@pytest.mark.parametrize("line", ["{", "[1]", '{"step": 1}', '{"step": 1, "stage": "a", "loss": "high", "timing": {}}'])
def test_a_broken_line_in_the_middle_is_refused(tmp_path, line):
    write_metrics(tmp_path, 3)
    path = tmp_path / "metrics.jsonl"
    path.write_text(line + "\n" + path.read_text())
    with pytest.raises(DataError, match="line 1"):
        write_report(tmp_path)


@pytest.mark.parametrize(("name", "text"), [("results.json", "[]"), ("examples.json", "{}"), ("run.json", "{")])
def test_a_file_of_another_kind_is_refused(tmp_path, name, text):
    full_run(tmp_path)
    (tmp_path / name).write_text(text)
    with pytest.raises(DataError, match=name):
        write_report(tmp_path)


@pytest.mark.parametrize("score", ["0.5", 1.5, -0.1, math.nan])
def test_a_score_that_is_no_share_is_refused(tmp_path, score):
    full_run(tmp_path)
    (tmp_path / "results.json").write_text(json.dumps({"s/t": {"accuracy": score}}))
    with pytest.raises(DataError, match="s/t"):
        write_report(tmp_path)


def test_an_example_without_a_reference_is_refused(tmp_path):
    full_run(tmp_path)
    lacking = example(0)
    del lacking["reference"]
    (tmp_path / "examples.json").write_text(json.dumps([lacking]))
    with pytest.raises(DataError, match="reference"):
        write_report(tmp_path)


def test_non_finite_losses_leave_a_gap(tmp_path):
    write_metrics(tmp_path, 20)
    lines = (tmp_path / "metrics.jsonl").read_text().replace('"loss": 0.4,', '"loss": "nan",')
    assert '"nan"' in lines
    (tmp_path / "metrics.jsonl").write_text(lines)
    page = Page(write_report(tmp_path).read_text())
    assert page.count("polyline", "raw") == 2 + 2 + 2  # two pieces linear, two logarithmic, and two whole other curves
    assert "1 not finite" in page.all


def test_a_loss_that_reaches_zero_has_no_logarithm_and_stays_in_sight(tmp_path):
    (tmp_path / "metrics.jsonl").write_text(
        "".join(json.dumps({"step": s, "stage": "a", "loss": 1.0 - s, "timing": {}}) + "\n" for s in (1, 2, 3))
    )
    page = Page(write_report(tmp_path).read_text())
    assert page.count("polyline", "raw") == 1
    assert page.count("figure", "log") == page.count("figure", "linear") == 0


def test_cards_are_taken_from_every_task(tmp_path):
    full_run(tmp_path)
    many = [example(number, task="train/naming") for number in range(40)]
    many.append(example(99, task="count", image_png_base64=[]))
    (tmp_path / "examples.json").write_text(json.dumps(many))
    page = Page(write_report(tmp_path).read_text())
    assert page.count("article", "card") == 24
    assert "What is number 99?" in page.all and "What is number 23?" not in page.all
    assert "out of 41 kept" in page.all


def test_the_headline_can_be_chosen(tmp_path):
    full_run(tmp_path)
    (tmp_path / "run.json").write_text(json.dumps({"headline": ["composition/skin tone", "gone/naming"]}))
    page = Page(write_report(tmp_path).read_text())
    assert "composition/skin tone" in page.all and "mean of" not in page.all


def test_the_old_page_stays_when_the_new_one_cannot_be_written(tmp_path, monkeypatch):
    old = write_report(full_run(tmp_path)).read_text()

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(RunFolderError, match="No space left"):
        write_report(tmp_path)
    assert (tmp_path / "report.html").read_text() == old
    assert not list(tmp_path.glob(".report.html*"))


def test_a_long_run_stays_a_small_page(tmp_path):
    write_metrics(tmp_path, 20_000)
    assert write_report(tmp_path).stat().st_size < 200_000


def test_thinning_keeps_spikes_and_the_axis_holds_all_points():
    values = [1.0] * 5000
    values[1234] = 50.0
    drawing = chart("loss", [Line(range(5000), values, "raw")])
    heights = [float(pair.split(",")[1]) for pair in re.search(r'points="([^"]+)"', drawing).group(1).split()]
    assert len(heights) < 700
    assert min(heights) < 25 and sum(height < 100 for height in heights) == 1
    assert min(heights) >= 12 and max(heights) <= 240 - 26


def test_names_of_short_stages_do_not_cover_each_other():
    marks = [(0, "language"), (2, "contrastive"), (4, "align"), (90, "instruct")]
    drawing = chart("x", [Line([0, 100], [0.0, 1.0], "raw")], marks=marks)
    places = [
        (float(x), float(y), len(name))
        for x, y, name in re.findall(r'<text class="tick" x="([\d.]+)" y="(\d+)">(\w+)<', drawing)
    ]
    assert len(places) == 4
    by_row = {y: sorted((x, n) for x, row, n in places if row == y) for _, y, _ in places}
    assert [len(row) for row in by_row.values()] == [2, 1, 1]
    assert all(a + 6 * n < b for row in by_row.values() for (a, n), (b, _) in zip(row, row[1:], strict=False))
    heights = [float(pair.split(",")[1]) for pair in re.search(r'points="([^"]+)"', drawing).group(1).split()]
    assert min(heights) > max(by_row)


@pytest.mark.parametrize("log", [False, True])
@pytest.mark.parametrize("values", [[1e-6, 3e-4], [0.5, 0.5], [2.0], [1.0, 1.001], [1e-5, 1e5], [3e9, 4e9]])
def test_every_axis_has_ticks(values, log):
    drawing = chart("x", [Line(range(len(values)), values, "raw")], log=log)
    assert 2 <= drawing.count('class="grid"') <= 10
    assert "nan" not in drawing


def test_the_moving_average_starts_unbiased_and_skips_gaps():
    assert ema([3.0, 3.0, math.nan, 3.0], 5) == pytest.approx([3.0, 3.0, 3.0, 3.0])
    assert math.isnan(ema([math.nan, 1.0], 5)[0])
    assert ema([0.0, 1.0], 3) == [0.0, pytest.approx(2 / 3)]


def test_the_terminal_table_holds_the_controls():
    out = io.StringIO()
    more = {"[bold]/[x]": {}, "whole": {"recall_at_5": 0.25, "bleu": 12.345}}
    Console(file=out, width=110).print(table(RESULTS | more))
    text = out.getvalue()
    rows = [" ".join(re.findall(r"[^│\s]+", line)) for line in text.splitlines()]
    assert "composition naming 63.1 % 2.1 % 1.3 % 1,187 – –" in rows
    assert "unseen category 100.0 % – 19.0 % 80 – –" in rows
    assert "[bold] [x] – – – – – –" in rows and "whole – – – – 25.0 % 12.35" in rows
    assert "tasks accuracy shuffled media majority n recall at 5 bleu" in re.sub(r"[┃\s]+", " ", text)
