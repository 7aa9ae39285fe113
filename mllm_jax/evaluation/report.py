"""report.html: what one run did, on one page that needs nothing but itself."""

from __future__ import annotations

import base64
import binascii
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
from mllm_jax.errors import DataError, RunFolderError
from mllm_jax.evaluation import figures
from mllm_jax.evaluation.charts import Line, chart, ema
from mllm_jax.evaluation.style import STYLE
from mllm_jax.evaluation.tables import percent
from mllm_jax.files import write_atomic
from mllm_jax.training.operations.goodput import KINDS

CARDS = 24
LEARNING_RATE = ("learning_rate", "lr")
NO_EVALUATION = '<p class="note">No evaluation was made in this run.</p>'


def write_report(run_dir: Path) -> Path:
    """Writes `report.html` into a run folder and returns its path.

    Reads `metrics.jsonl`, and where they exist `goodput.json`, `results.json` (accuracies from 0 to 1; an optional
    `"descriptions": {split: text}`), `examples.json` (pictures as base64 PNG) and `run.json` (free facts; `"headline":
    [[split, task], ...]` chooses the large figures). What is missing is not shown. The page loads nothing: no script,
    no font, no address. An older page is replaced at once or not at all.

    Raises:
        DataError: metrics.jsonl is missing, or a file does not hold what it should.
        RunFolderError: the page cannot be written.
    """
    run_dir = Path(run_dir)
    points = _metrics(run_dir / "metrics.jsonl")
    run = _json(run_dir / "run.json", dict) or {}
    results = _checked(_json(run_dir / "results.json", dict) or {})
    examples = _json(run_dir / "examples.json", list)
    title = str(run.get("config", run_dir.resolve().name))
    body = [
        f'<header><p class="eyebrow">mllm_jax · run report</p><h1>{escape(title)}</h1>',
        f"{_machine(run)}{_origin(run_dir)}</header>",
        _headline(run, results, points),
        _section("Accuracy", _accuracies(results) if results.get("splits") else NO_EVALUATION),
        _section("Training", _curves(points)),
        _section("Stages", _stages(run.get("stages", []))),
        _section("Where the time went", _time(_json(run_dir / "goodput.json", dict))),
        _section("The run", _facts(run)),
        _section("Questions and answers", NO_EVALUATION if examples is None else _cards(examples)),
        _section("How the figures were made", _method()),
    ]
    # The policy makes the browser itself keep the promise that nothing is loaded and nothing runs.
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
    """One line of metrics.jsonl; `values` holds the timing too, as `timing/<name>`."""

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
            if number == len(lines):  # without a newline: a run that is writing it or died while writing it
                break
            raise DataError(
                f"{path}, line {number}: {text[:60]!r}",
                'a JSON object with "step", "stage" and numbers',
                "remove that line, or train again into a fresh folder",
            ) from None
    return points


def _json(path: Path, kind: type) -> Any:
    """The file's content, None if there is no such file."""
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


def _checked(results: dict[str, Any]) -> dict[str, Any]:
    """The results, once every score in them is seen to be one."""
    for split, tasks in results.get("splits", {}).items():
        for task, scores in tasks.items():
            for name in ("accuracy", "accuracy_shuffled_images", "majority"):
                score = scores.get(name)
                if score is not None and not (isinstance(score, int | float) and 0 <= score <= 1):
                    todo = "evaluate again to write the file anew"
                    raise DataError(f"results.json: {name} of {split}/{task} is {score!r}", "a share, 0 to 1", todo)
    return results


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
    """Where the whole config is, the command that goes on with the run, and the version that wrote the page."""
    command = f"mllm train {shlex.quote(str(run_dir))}"
    return (
        '<p class="note"><code>config.json</code> beside this page is the whole config; '
        f"<code>{escape(command)}</code> goes on with the run. Written by mllm_jax {__version__}.</p>"
    )


def _headline(run: Mapping, results: Mapping, points: Sequence[Point]) -> str:
    splits = results.get("splits", {})
    tiles = []
    if chosen := [(s, t) for s, t in run.get("headline", []) if t in splits.get(s, {})]:
        tiles += [_accuracy_tile(f"{task} · {split}", [splits[split][task]]) for split, task in chosen]
    else:
        for split, tasks in splits.items():
            count = f"mean of {len(tasks)} tasks" if len(tasks) > 1 else next(iter(tasks), "no task")
            tiles.append(_accuracy_tile(f"{split} · {count}", list(tasks.values())))
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


def _accuracy_tile(label: str, scores: Sequence[Mapping]) -> str:
    def mean(key: str) -> float | None:
        values = [task.get(key) for task in scores]
        return None if not values or None in values else sum(values) / len(values)

    controls = f"shuffled {percent(mean('accuracy_shuffled_images'))}, majority {percent(mean('majority'))}"
    return _tile(percent(mean("accuracy")), label, controls)


def _tile(value: str, label: str, below: str) -> str:
    small = f"<small>{escape(below)}</small>"
    return f'<div class="tile"><strong>{escape(value)}</strong><span>{escape(label)}</span>{small}</div>'


def _accuracies(results: Mapping[str, Any]) -> str:
    parts = [
        '<p class="legend"><i class="key fill"></i> accuracy <i class="key solid"></i> above: with shuffled '
        'pictures <i class="key dashed"></i> below: majority answer</p>'
    ]
    for split, tasks in results.get("splits", {}).items():
        about = results.get("descriptions", {}).get(split)
        parts.append(f"<h3>{escape(split)}</h3>" + (f'<p class="note">{escape(about)}</p>' if about else ""))
        rows = []
        for task, scores in tasks.items():
            accuracy, n = scores.get("accuracy"), scores.get("n")
            shuffled, majority = scores.get("accuracy_shuffled_images"), scores.get("majority")
            doubt = f" <small>± {100 * _wilson(accuracy, n):.1f}</small>" if accuracy is not None and n else ""
            rows.append(
                f"<tr><th>{escape(task)}</th><td>{_bar(accuracy, shuffled, majority)}</td>"
                f'<td class="n"><b>{percent(accuracy)}</b>{doubt}</td><td class="n">{percent(shuffled)}</td>'
                f'<td class="n">{percent(majority)}</td><td class="n">{"–" if n is None else f"{n:,}"}</td></tr>'
            )
        head = "".join(f"<th>{h}</th>" for h in ("task", "", "accuracy", "shuffled pictures", "majority", "n"))
        table = f'<table class="scores"><thead><tr>{head}</tr></thead><tbody>{"".join(rows)}</tbody></table>'
        parts.append(f'<div class="wide">{table}</div>')
    return "".join(parts)


def _bar(accuracy: float | None, shuffled: float | None, majority: float | None) -> str:
    """A bar with a tick for each control: one above and solid, one below and dashed, so that neither needs a colour."""
    parts = ['<rect class="track" y="5" width="200" height="8" rx="2"/>']
    if accuracy is not None:
        parts.append(f'<rect class="fill" y="5" width="{200 * accuracy:.1f}" height="8" rx="2"/>')
    for css, value, y1, y2 in (("solid", shuffled, 0, 9), ("dashed", majority, 9, 18)):
        if value is not None:
            x = 200 * value
            parts.append(f'<line class="{css}" x1="{x:.1f}" x2="{x:.1f}" y1="{y1}" y2="{y2}"/>')
    label = f"accuracy {percent(accuracy)}, shuffled pictures {percent(shuffled)}, majority {percent(majority)}"
    return f'<svg class="bar" viewBox="-1 0 202 18" role="img" aria-label="{label}">{"".join(parts)}</svg>'


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
        told = f"{losses[0]:.4g} at first, {smooth[-1]:.4g} at last" + (f"; {broken} not finite" if broken else "")
        # A loss that reaches zero has no logarithm: such a stage keeps its one picture under both settings.
        both = all(loss > 0 for loss in losses if math.isfinite(loss))
        for css, log in (("linear", False), ("log", True)) if both else (("", False),):
            drawing = chart(f"loss of {stage}", [Line(steps, losses, "raw"), Line(steps, smooth, "smooth")], log=log)
            drawings.append(_picture(f"{stage}: loss", told, drawing, css))
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
        return _picture(title, f"{value:.4g} at last", chart(title, lines, marks=begins))

    if rate:
        drawings.append(over_run(rate, "smooth"))
    switch = '<input type="checkbox" id="log"><label for="log">logarithmic loss axis</label>'
    page = f'{switch}<div class="charts">{"".join(drawings)}</div>'
    # Sums that only grow are in the table of where the time went.
    if others := [name for name in names if name != rate and not name.endswith("_seconds")]:
        drawn = "".join(over_run(name) for name in others)
        summary = figures.count(len(others), "more curve")
        page += f'<details><summary>{summary}</summary><div class="charts">{drawn}</div></details>'
    return page


def _picture(title: str, told: str, drawing: str, css: str = "") -> str:
    caption = f"<b>{escape(title)}</b> <span>{escape(told)}</span>"
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
    right = sum(bool(example["correct"]) for _, example in shown)
    cards = []
    for number, example in shown:
        pictures = "".join(
            f'<img alt="picture {place}" src="data:image/png;base64,{_png(text, number)}">'
            for place, text in enumerate(example.get("image_png_base64", []), start=1)
        )
        css, verdict = ("right", "✓ right") if example["correct"] else ("wrong", "✗ wrong")
        about = " · ".join(str(example[key]) for key in ("split", "task") if key in example)
        cards.append(
            f'<article class="card {css}"><div class="pictures">{pictures}</div>'
            f'<p class="question">{escape(str(example["question"]))}</p>'
            f"<dl><dt>answer</dt><dd>{escape(str(example['answer']))}</dd>"
            f"<dt>truth</dt><dd>{escape(str(example['truth']))}</dd></dl>"
            f'<p class="verdict"><b>{verdict}</b> <span>{escape(about)}</span></p></article>'
        )
    note = f"{right} of these {len(shown)} are right"
    if len(examples) > len(shown):
        note += f"; they are the first of each split and task in turn, out of {len(examples)} kept"
    return f'<p class="note">{note}.</p><div class="cards">{"".join(cards)}</div>'


def _spread(examples: Sequence[Mapping[str, Any]]) -> list[tuple[int, Mapping[str, Any]]]:
    """The first CARDS examples with their places in the file, taken from each split and task in turn."""
    seen: Counter = Counter()
    ranked = []
    for number, example in enumerate(examples):
        missing = {"question", "answer", "truth", "correct"} - set(example)
        if missing:
            todo = "evaluate again to write the file anew"
            raise DataError(f"examples.json, entry {number} lacks {sorted(missing)}", "an entry with all of them", todo)
        group = (example.get("split"), example.get("task"))
        ranked.append((seen[group], number, example))
        seen[group] += 1
    ranked.sort(key=lambda item: item[:2])
    return sorted(((number, example) for _, number, example in ranked[:CARDS]), key=lambda item: item[0])


def _png(text: str, number: int) -> str:
    try:
        sound = base64.b64decode(text, validate=True).startswith(b"\x89PNG\r\n\x1a\n")
    except (binascii.Error, ValueError, TypeError):
        sound = False
    if not sound:
        todo = "evaluate again to write the file anew"
        raise DataError(f"examples.json, entry {number}: a picture that is no PNG", "PNG bytes in base64", todo)
    return text


def _time(account: Mapping[str, Any] | None) -> str:
    """Seconds by kind over all starts of the run, and their shares of all the time since the first."""
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
        "<b>Accuracy</b> is the share of a task's questions that its scorer judged right. The small ± is half the "
        "width of the 95 % Wilson interval, in points: what chance in the choice of n questions leaves open.",
        "<b>Shuffled pictures</b>: the very same questions, asked once more with the pictures exchanged among them. "
        "Whatever accuracy is left there comes from the words alone, not from looking.",
        "<b>Majority</b> is what always giving a task's most frequent answer would score.",
        "<b>Curves</b>: the faint line is each logged value of metrics.jsonl as it was; the strong one is its "
        "exponential moving average over a fortieth of the stage's logged points, at least five. Steps count over all "
        "stages. Values that are not finite leave a gap.",
        "<b>Where the time went</b>: each second between the run's first start and the end of its training counts "
        "once. A wait for a batch is input only if the devices had nothing left to compute; validation, starting and "
        "restoring are other.",
        "<b>Sources</b>: metrics.jsonl, goodput.json, run.json, results.json and examples.json of the run folder; this "
        "page rounds, they do not.",
    )
    return f'<ul class="method">{"".join(f"<li>{note}</li>" for note in notes)}</ul>'


def _smooth(values: Sequence[float]) -> list[float]:
    """The moving average over a fortieth of a stage, at least five points."""
    return ema(values, max(5.0, len(values) / 40))


def _wilson(share: float, n: int, z: float = 1.96) -> float:
    """Half the width of Wilson's interval, which unlike the normal one is not zero at 0 % and 100 %."""
    return z * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n)) / (1 + z * z / n)
