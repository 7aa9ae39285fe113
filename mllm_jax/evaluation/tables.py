"""Results by task and metric: grouped for tables, and as a table for the terminal."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.table import Table

Results = Mapping[str, Mapping[str, float]]  # task -> metric -> value


def groups(results: Results) -> Iterator[tuple[str, dict[str, Mapping[str, float]], list[str]]]:
    """Tasks whose names begin alike, up to the last `/`: (the beginning, {the rest: {metric: value}}, all metrics)."""
    found: dict[str, dict[str, Mapping[str, float]]] = {}
    for name, values in results.items():
        group, _, task = name.rpartition("/")
        found.setdefault(group, {})[task] = values
    for group, tasks in found.items():
        yield group, tasks, list(dict.fromkeys(metric for values in tasks.values() for metric in values))


def table(results: Results) -> Table:
    """Every metric of every task, a section for each group of tasks; what a task lacks is shown as a dash."""
    from rich.table import Table
    from rich.text import Text

    metrics = list(dict.fromkeys(metric for values in results.values() for metric in values))
    shown = Table("task", header_style="bold", pad_edge=False)
    for metric in metrics:
        shown.add_column(Text(words(metric)), justify="right")
    for group, tasks, _ in groups(results):
        for row, (task, values) in enumerate(tasks.items()):
            cells = [written(values.get(metric)) for metric in metrics]
            shown.add_row(Text(f"{group}/{task}" if group else task), *cells, end_section=row == len(tasks) - 1)
    return shown


def words(key: str) -> str:
    return key.removesuffix("_bytes").replace("_", " ")


def written(value: float | None) -> str:
    """A metric's value: 1187 -> "1,187", a share 0.6312 -> "63.1 %", any other number with four digits."""
    if is_share(value):
        return percent(value)
    return "–" if value is None else f"{value:,}" if isinstance(value, int) else f"{value:,.4g}"


def is_share(value: float | None) -> bool:
    return isinstance(value, float) and 0 <= value <= 1


def percent(share: float | None) -> str:
    """`0.6312` -> `"63.1 %"`; a dash for what was not measured."""
    return "–" if share is None or not math.isfinite(share) else f"{share:.1%}".replace("%", " %")
