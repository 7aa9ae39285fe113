"""The results in the report: a table for each group of tasks, a bar for each accuracy, with ticks for its controls."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from mllm_jax.errors import DataError
from mllm_jax.evaluation.tables import SHUFFLED, Results, grouped, heading, is_share, metric, metrics_of, percent

CONTROLS = {f"accuracy{SHUFFLED}": "solid", "majority": "dashed"}


def checked(results: dict[str, Any]) -> Results:
    """Returns the results after checking that every value is a number, and every share from 0 to 1.

    Raises:
        DataError: another value, or another structure.
    """
    todo = "evaluate again to rewrite the file"
    for task, found in results.items():
        if not isinstance(found, dict):
            raise DataError(f"results.json: {task} is {found!r:.80}", "{task: {metric: value}}", todo)
        for name, value in found.items():
            number = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
            if value is not None and not (number and (0 <= value <= 1 or not is_share(name))):
                expected = "a share, 0 to 1" if is_share(name) else "a number"
                raise DataError(f"results.json: {name} of {task} is {value!r:.80}", expected, todo)
    return results


def summary(tasks: Sequence[Mapping[str, float]], label: str) -> tuple[str, str, str]:
    """Returns a headline figure: the mean of the first metric, its description, and the means of its controls."""

    def mean(name: str) -> float | None:
        values = [found.get(name) for found in tasks]
        return None if None in values else sum(values) / len(values)

    first = next(iter(tasks[0]), "accuracy")
    others = {"shuffled": mean(f"{first}{SHUFFLED}"), "majority": mean("majority")}
    below = ", ".join(f"{name} {percent(value)}" for name, value in others.items() if value is not None)
    return metric(first, mean(first)), label, below or heading(first)


def section(results: Results) -> str:
    parts = []
    if any("accuracy" in found for found in results.values()):
        parts.append(
            '<p class="legend"><i class="key fill"></i> accuracy <i class="key solid"></i> above: with shuffled '
            'media <i class="key dashed"></i> below: majority answer</p>'
        )
    for group, tasks in grouped(results).items():
        names = metrics_of(tasks)
        head = "".join(f"<th>{escape(each)}</th>" for each in ("task", "", *map(heading, names)))
        rows = "".join(
            f"<tr><th>{escape(task)}</th><td>{_bar(found)}</td>{''.join(_cell(name, found) for name in names)}</tr>"
            for task, found in tasks.items()
        )
        table = f'<table class="scores"><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table>'
        parts.append(f'<h3>{escape(group)}</h3><div class="wide">{table}</div>')
    return "".join(parts)


def _cell(name: str, found: Mapping[str, float]) -> str:
    value, n = found.get(name), found.get("n")
    text = escape(metric(name, value))
    if name == "accuracy":
        text = f"<b>{text}</b>"
        text += f" <small>± {100 * _wilson(value, n):.1f}</small>" if value is not None and n else ""
    return f'<td class="n">{text}</td>'


def _bar(found: Mapping[str, float]) -> str:
    """Draws a bar with a tick for each control, one above and solid, one below and dashed, readable without colour."""
    accuracy = found.get("accuracy")
    if accuracy is None:
        return ""
    parts = [
        '<rect class="track" y="5" width="200" height="8" rx="2"/>',
        f'<rect class="fill" y="5" width="{200 * accuracy:.1f}" height="8" rx="2"/>',
    ]
    for name, css in CONTROLS.items():
        if (value := found.get(name)) is not None:
            y = 0 if css == "solid" else 9
            parts.append(f'<line class="{css}" x1="{200 * value:.1f}" x2="{200 * value:.1f}" y1="{y}" y2="{y + 9}"/>')
    shown = ("accuracy", *(name for name in CONTROLS if name in found))
    label = ", ".join(f"{heading(name)} {percent(found.get(name))}" for name in shown)
    return f'<svg class="bar" viewBox="-1 0 202 18" role="img" aria-label="{label}">{"".join(parts)}</svg>'


def _wilson(share: float, n: int, z: float = 1.96) -> float:
    """Returns half the width of Wilson's interval, which unlike the normal one is not zero at 0 % and 100 %."""
    return z * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n)) / (1 + z * z / n)
