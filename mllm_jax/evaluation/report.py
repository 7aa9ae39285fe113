"""report.html: the results of one run on one self-contained page."""

from __future__ import annotations

import json
import math
import shlex
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

from mllm_jax import __version__
from mllm_jax.checkpoints.run import RunFolder, read_json_lines
from mllm_jax.errors import DataError, RunFolderError
from mllm_jax.evaluation import figures, scores
from mllm_jax.evaluation.charts import Line, chart, ema
from mllm_jax.evaluation.shown_media import html
from mllm_jax.evaluation.style import STYLE
from mllm_jax.evaluation.tables import grouped, percent
from mllm_jax.files import write_atomic
from mllm_jax.training.evaluation import EVALUATION
from mllm_jax.training.operations.goodput import KINDS

CARDS = 24
CHARACTERS = 200  # of a value that changed
LEARNING_RATE = ("learning_rate", "lr")
VALIDATION = "validation_loss"
NO_EVALUATION = '<p class="note">No evaluation was made in this run.</p>'


def write_report(run_dir: Path) -> Path:
    """Writes `report.html` into a run folder and returns its path.

    Reads `metrics.jsonl`, and where they exist `goodput.json`, `results.json` ({task: {metric: value}}),
    `examples.json` (media as base64), `changes.jsonl` and `run.json` (free facts; `"headline": [task, ...]`
    chooses the large figures). Missing files are left out. The page loads nothing: no script, no font, no address. An
    older page is replaced at once or not at all.

    Raises:
        DataError: metrics.jsonl is missing, or a file does not hold what it should.
        RunFolderError: the page cannot be written.
    """
    run_dir = Path(run_dir)
    points = _metrics(run_dir / "metrics.jsonl")
    run = _json(run_dir / "run.json", dict) or {}
    results = scores.checked(_json(run_dir / "results.json", dict) or {})
    examples = _json(run_dir / "examples.json", list)
    title = str(run.get("config", run_dir.resolve().name))
    body = [
        f'<header><p class="eyebrow">mllm_jax · run report</p><h1>{escape(title)}</h1>',
        f"{_machine(run)}{_origin(run_dir)}</header>",
        _headline(run, results, points),
        _section("Results", scores.section(results) if results else NO_EVALUATION),
        _section("Training", _curves(points)),
        _section("Stages", _stages(run.get("stages", []))),
        _section("Changes on the way", _changes(read_json_lines(RunFolder(run_dir).changes))),
        _section("Where the time went", _time(_json(run_dir / "goodput.json", dict))),
        _section("The run", _facts(run)),
        _section("Questions and answers", NO_EVALUATION if examples is None else _cards(examples)),
        _section("How the figures were made", _method()),
    ]
    # With this policy the browser itself loads nothing and runs nothing.
    policy = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
    page = (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(title)} · run report</title><style>{STYLE}</style></head>\n"
        f"<body><main>{''.join(body)}</main></body></html>\n"
    )
    return _replace(run_dir / "report.html", page)


# --------------------------------------------------------------------------------------------------
# Reading and writing
# --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Point:
    """One line of metrics.jsonl; `values` also holds the timing, as `timing/<name>`."""

    step: int
    stage: str
    values: dict[str, float]


def _metrics(path: Path) -> list[Point]:
    try:
        lines = path.read_bytes().split(b"\n")
    except FileNotFoundError:
        raise DataError(
            f"{path}: no such file", "the metrics of a run that has trained", "give the folder of a run"
        ) from None
    points = []
    for number, text in enumerate(lines, start=1):
        if not text and number == len(lines):
            break
        try:
            line = json.loads(text)
            step, stage, timing = line.pop("step"), line.pop("stage"), line.pop("timing", {})
            values = line | {f"timing/{name}": value for name, value in timing.items()}
            points.append(Point(int(step), str(stage), {name: float(value) for name, value in values.items()}))
        except (ValueError, TypeError, KeyError, AttributeError):
            if number == len(lines):  # without a newline: a run is writing it, or died meanwhile
                break
            raise DataError(
                f"{path}, line {number}: {text[:60]!r}",
                'a JSON object with "step", "stage" and numbers',
                "remove that line, or train again into a fresh folder",
            ) from None
    return points


def _json(path: Path, kind: type) -> Any:
    """Reads a file; None if it does not exist."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except ValueError as error:
        raise DataError(f"{path}: {error}", "valid JSON", "remove the file, or write it again") from error
    if not isinstance(content, kind):
        expected = {dict: "a JSON object", list: "a JSON list"}[kind]
        raise DataError(f"{path} holds a {type(content).__name__}", expected, "remove the file, or write it again")
    return content


def _replace(path: Path, text: str) -> Path:
    try:
        write_atomic(path, text)
    except OSError as error:
        todo = "free space or permit writing, then ask for the report again"
        raise RunFolderError(f"{path}: {error.strerror or error}", "a run folder that can be written", todo) from error
    return path


# --------------------------------------------------------------------------------------------------
# Sections
# --------------------------------------------------------------------------------------------------


def _section(title: str, content: str) -> str:
    return f"<section><h2>{title}</h2>{content}</section>" if content else ""


def _machine(run: Mapping[str, Any]) -> str:
    return f'<p class="note">{escape(figures.figure("machine", run["machine"]))}</p>' if "machine" in run else ""


def _origin(run_dir: Path) -> str:
    """Returns a note on the config's file, the command that continues the run, and the version of the page."""
    command = f"mllm train {shlex.quote(str(run_dir))}"
    return (
        '<p class="note"><code>config.json</code> beside this page is the whole config; '
        f"<code>{escape(command)}</code> continues the run. Written by mllm_jax {__version__}.</p>"
    )


def _headline(run: Mapping, results: Mapping, points: Sequence[Point]) -> str:
    chosen = {name: [results[name]] for name in run.get("headline", []) if name in results}
    if not chosen:
        for group, tasks in grouped(results).items():
            count = f"mean of {len(tasks)} tasks" if len(tasks) > 1 else next(iter(tasks))
            chosen[f"{group} · {count}" if group else count] = list(tasks.values())
    tiles = [_tile(*scores.summary(found, label)) for label, found in chosen.items()]
    if losses := [(p.stage, p.values["loss"]) for p in points if "loss" in p.values]:
        last = losses[-1][0]
        value = _smooth([loss for stage, loss in losses if stage == last])[-1]
        tiles.append(_tile(f"{value:.3g}", "final loss", f"stage {last}"))
    seconds = [stage["seconds"] for stage in run.get("stages", []) if "seconds" in stage]
    if seconds:
        tiles.append(_tile(figures.duration(sum(seconds)), "training time", figures.count(len(seconds), "stage")))
    if parts := run.get("parameters"):
        tiles.append(_tile(figures.short(parts.get("total", sum(parts.values()))), "parameters", ", ".join(parts)))
    # At most five in a row, and rows of nearly the same length: no tile is left alone.
    columns = math.ceil(len(tiles) / math.ceil(len(tiles) / 5)) if tiles else 0
    return f'<div class="tiles" style="--columns: {columns}">{"".join(tiles)}</div>' if tiles else ""


def _tile(value: str, label: str, below: str) -> str:
    small = f"<small>{escape(below)}</small>"
    return f'<div class="tile"><strong>{escape(value)}</strong><span>{escape(label)}</span>{small}</div>'


def _curves(points: Sequence[Point]) -> str:
    if not points:
        return '<p class="note">No step was logged.</p>'
    stages = list(dict.fromkeys(point.stage for point in points))
    drawings = []
    for stage in stages:
        found = [(p.step, p.values["loss"]) for p in points if p.stage == stage and "loss" in p.values]
        if not found:
            continue
        steps, losses = zip(*found, strict=True)
        smooth = _smooth(losses)
        broken = sum(not math.isfinite(loss) for loss in losses)
        ends = f"{losses[0]:.4g} at first, {smooth[-1]:.4g} at last" + (f"; {broken} not finite" if broken else "")
        # A loss of zero has no logarithm: such a stage shows the same curve under both settings.
        both = all(loss > 0 for loss in losses if math.isfinite(loss))
        for css, log in (("linear", False), ("log", True)) if both else (("", False),):
            drawing = chart(f"loss of {stage}", [Line(steps, losses, "raw"), Line(steps, smooth, "smooth")], log=log)
            drawings.append(_curve(f"{stage}: loss", ends, drawing, css))
    begins = [(next(p.step for p in points if p.stage == stage), stage) for stage in stages]
    names = list(dict.fromkeys(name for point in points for name in point.values if name != "loss"))
    rate = next((name for name in LEARNING_RATE if name in names), None)

    def over_run(name: str, css: str = "raw") -> str:
        lines, value = [], math.nan
        for stage in stages:
            found = [(p.step, p.values[name]) for p in points if p.stage == stage and name in p.values]
            steps, values = zip(*found, strict=True) if found else ((), ())
            value = values[-1] if found else value
            lines.append(Line(steps, values, css))
            if css == "raw":
                lines.append(Line(steps, _smooth(values), "smooth"))
        title = figures.words(name)
        return _curve(title, f"{value:.4g} at last", chart(title, lines, marks=begins))

    judged = [name for name in names if name == VALIDATION or name.startswith(EVALUATION)]
    drawings += [over_run(name, "smooth") for name in judged]
    if rate:
        drawings.append(over_run(rate, "smooth"))
    switch = '<input type="checkbox" id="log"><label for="log">logarithmic loss axis</label>'
    page = f'{switch}<div class="charts">{"".join(drawings)}</div>'
    # Sums that only grow are in the table of time.
    if others := [name for name in names if name not in (rate, *judged) and not name.endswith("_seconds")]:
        drawn = "".join(over_run(name) for name in others)
        summary = figures.count(len(others), "more curve")
        page += f'<details><summary>{summary}</summary><div class="charts">{drawn}</div></details>'
    return page


def _curve(title: str, ends: str, drawing: str, css: str = "") -> str:
    caption = f"<b>{escape(title)}</b> <span>{escape(ends)}</span>"
    return f'<figure class="{css}"><figcaption>{caption}</figcaption>{drawing}</figure>'


def _stages(stages: Sequence[Mapping[str, Any]]) -> str:
    known = ["name", "objective", "steps", "seconds", "tokens_per_second", "packing"]
    known += ["trainable_bytes", "frozen_bytes", "optimizer_bytes"]
    present = list(dict.fromkeys(key for stage in stages for key in stage))
    columns = [key for key in known if key in present] + [key for key in present if key not in known]
    if not columns:
        return ""
    titles = {"name": "stage", "seconds": "time", "tokens_per_second": "tokens/s"}
    head = "".join(f"<th>{escape(titles.get(key, figures.words(key)))}</th>" for key in columns)
    rows = []
    for stage in stages:
        cells = [escape(figures.figure(key, stage[key])) if key in stage else "–" for key in columns]
        first, *rest = cells
        rows.append(f"<tr><th>{first}</th>" + "".join(f'<td class="n">{cell}</td>' for cell in rest) + "</tr>")
    table = f"<table><thead><tr>{head}</tr></thead><tbody>{''.join(rows)}</tbody></table>"
    return f'<div class="wide">{table}</div>'


def _changes(changes: Sequence[Mapping[str, Any]]) -> str:
    """Returns a table of the config's changes between starts of the run, in order."""
    if not changes:
        return ""
    columns = {"stage": "stage", "step": "after step", "field": "field", "from": "from", "to": "to"}
    head = "".join(f"<th>{title}</th>" for title in columns.values())
    rows = "".join(
        "<tr>" + "".join(f"<td>{escape(str(one.get(key, '–'))[:CHARACTERS])}</td>" for key in columns) + "</tr>"
        for one in changes
    )
    note = '<p class="note">From these steps on the values of config.json hold.</p>'
    return f'{note}<div class="wide"><table><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table></div>'


def _facts(run: Mapping[str, Any]) -> str:
    shown = {key: value for key, value in run.items() if key not in ("config", "machine", "stages", "headline")}
    rows = [
        f"<dt>{escape(figures.words(key))}</dt><dd>{escape(figures.figure(key, value))}</dd>"
        for key, value in shown.items()
    ]
    return f'<dl class="facts">{"".join(rows)}</dl>' if rows else ""


def _cards(examples: Sequence[Mapping[str, Any]]) -> str:
    shown = _spread(examples)
    if not shown:
        return '<p class="note">No examples were kept.</p>'
    judged = [example["correct"] for _, example in shown if example["correct"] is not None]
    cards = []
    for number, example in shown:
        css, verdict = {True: ("right", "✓ right"), False: ("wrong", "✗ wrong"), None: ("", "")}[example["correct"]]
        texts = {"answer": example["answer"], "reference": example["reference"]}
        answers = "".join(
            f"<dt>{name}</dt><dd>{escape(str(text))}</dd>" for name, text in texts.items() if text is not None
        )
        cards.append(
            f'<article class="card {css}"><div class="images">{html(example, number)}</div>'
            f'<p class="question">{escape(str(example["question"]))}</p><dl>{answers}</dl>'
            f'<p class="verdict"><b>{verdict}</b> <span>{escape(str(example["task"]))}</span></p></article>'
        )
    notes = [f"{sum(judged)} of these {len(judged)} are right"] if judged else []
    if len(examples) > len(shown):
        notes.append(f"these are the first of each task in turn, out of {len(examples)} kept")
    note = f'<p class="note">{"; ".join(notes)}.</p>' if notes else ""
    return f'{note}<div class="cards">{"".join(cards)}</div>'


def _spread(examples: Sequence[Mapping[str, Any]]) -> list[tuple[int, Mapping[str, Any]]]:
    """Returns the first CARDS examples with their numbers in the file, taken from each task in turn."""
    seen: Counter = Counter()
    ranked = []
    for number, example in enumerate(examples):
        missing = {"task", "question", "answer", "reference", "correct"} - set(example)
        if missing or example["correct"] not in (True, False, None):
            todo = "evaluate again to write the file anew"
            raise DataError(
                f"examples.json, entry {number} lacks {sorted(missing) or 'a verdict'}", "a whole entry", todo
            )
        ranked.append((seen[example["task"]], number, example))
        seen[example["task"]] += 1
    ranked.sort(key=lambda item: item[:2])
    return sorted(((number, example) for _, number, example in ranked[:CARDS]), key=lambda item: item[0])


def _time(account: Mapping[str, Any] | None) -> str:
    """Tabulates seconds by kind over all starts of the run, and their shares of the time since the first."""
    if account is None:
        return ""
    try:
        seconds = {kind: float(account["seconds"][kind]) for kind in KINDS}
        total, starts = sum(seconds.values()), int(account["starts"])
    except (KeyError, TypeError, ValueError) as error:
        todo = "remove the file, or restore it"
        raise DataError(f"goodput.json: {type(error).__name__}: {error}", "seconds of each kind", todo) from error
    rows = "".join(
        f'<tr><th>{kind}</th><td class="n">{figures.duration(value)}</td><td class="n">{percent(value / total)}</td>'
        f"<td>{escape(KINDS[kind])}</td></tr>"
        for kind, value in seconds.items()
        if value > 0
    )
    head = "<thead><tr><th>kind</th><th>time</th><th>share</th><th>what</th></tr></thead>"
    note = f'<p class="note">All the time since the run first started; {figures.count(starts, "start")}.</p>'
    return f'{note}<div class="wide"><table>{head}<tbody>{rows}</tbody></table></div>' if total else ""


def _method() -> str:
    notes = (
        "<b>Accuracy</b> is the share of a task's answers that its metric judged right. The small ± is half the width "
        "of the 95 % Wilson interval, in points: what chance in the choice of n questions leaves open.",
        "<b>Shuffled media</b>: the same questions, asked once more with the images exchanged among them. Whatever "
        "is left there comes from the words alone, not from looking.",
        "<b>Majority</b> is what always giving a task's most frequent answer would score.",
        "<b>Curves</b>: the faint line is each logged value of metrics.jsonl as it was; the strong one is its "
        "exponential moving average over a fortieth of the stage's logged points, at least five. Steps count over all "
        "stages. Values that are not finite leave a gap.",
        "<b>Where the time went</b>: each second between the run's first start and the end of its training counts "
        "once. A wait for a batch is input only if the devices had nothing left to compute; validation, starting and "
        "restoring are other.",
        "<b>Sources</b>: metrics.jsonl, goodput.json, run.json, changes.jsonl, results.json and examples.json of the "
        "run folder; this page rounds, they do not.",
    )
    return f'<ul class="method">{"".join(f"<li>{note}</li>" for note in notes)}</ul>'


def _smooth(values: Sequence[float]) -> list[float]:
    """Returns the moving average over a fortieth of a stage, at least five points."""
    return ema(values, max(5.0, len(values) / 40))
