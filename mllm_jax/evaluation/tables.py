"""The results of an evaluation as a table for the terminal, and the format of a metric's value."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.table import Table

Results = Mapping[str, Mapping[str, float]]  # {task: {metric: value}}
SHUFFLED = "_shuffled_media"
SHARES = ("accuracy", "majority", "recall")  # in the names of metrics from 0 to 1


def table(results: Results) -> Table:
    """Builds a table of every metric of every task, a section for each group; a missing value is a dash."""
    from rich.table import Table
    from rich.text import Text

    names = metrics_of(results)
    shown = Table("tasks", "", header_style="bold", pad_edge=False)
    for name in names:
        shown.add_column(heading(name), justify="right")
    for group, tasks in grouped(results).items():
        for row, (label, found) in enumerate(tasks.items()):
            cells = [metric(name, found.get(name)) for name in names]
            shown.add_row(
                Text(group if row == 0 else "", style="bold"),
                Text(label),
                *(Text(cell, style="" if place else "bold") for place, cell in enumerate(cells)),
                end_section=row == len(tasks) - 1,
            )
    return shown


def grouped(results: Results) -> dict[str, dict[str, Mapping[str, float]]]:
    """Returns {the part before "/": {the part after it: {metric: value}}} in order; "" for names without "/"."""
    groups: dict[str, dict[str, Mapping[str, float]]] = {}
    for name, found in results.items():
        group, _, label = name.rpartition("/")
        groups.setdefault(group, {})[label] = found
    return groups


def metrics_of(results: Results) -> list[str]:
    """Returns the names of all metrics in order."""
    return list(dict.fromkeys(name for found in results.values() for name in found))


def heading(name: str) -> str:
    return ("shuffled media" if name == f"accuracy{SHUFFLED}" else name).replace("_", " ")


def is_share(name: str) -> bool:
    return any(word in name.lower() for word in SHARES)


def metric(name: str, value: float | None) -> str:
    """Returns a metric's value as text; a percentage if its name says that it is a share."""
    if is_share(name):
        return percent(value)
    return "–" if value is None else f"{value:,}" if isinstance(value, int) else f"{value:,.4g}"


def percent(share: float | None) -> str:
    """Formats a share: `0.6312` -> `"63.1 %"`; None is a dash."""
    return "–" if share is None or not math.isfinite(share) else f"{share:.1%}".replace("%", " %")
