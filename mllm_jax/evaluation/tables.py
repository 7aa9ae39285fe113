"""The accuracies of a run as a table for the terminal."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.table import Table


def table(results: Mapping[str, Any]) -> Table:
    """Every accuracy beside its two controls, a section for each split.

    Args:
        results: what results.json holds, `{"splits": {split: {task: {"accuracy", "accuracy_shuffled_images",
            "majority", "n"}}}}`, accuracies from 0 to 1; what a task lacks is shown as a dash.
    """
    from rich.table import Table
    from rich.text import Text

    shown = Table("split", "task", header_style="bold", pad_edge=False)
    for heading in ("accuracy", "shuffled pictures", "majority answer", "n"):
        shown.add_column(heading, justify="right")
    for split, tasks in results.get("splits", {}).items():
        for row, (task, scores) in enumerate(tasks.items()):
            shown.add_row(
                Text(split if row == 0 else "", style="bold"),
                Text(task),
                Text(percent(scores.get("accuracy")), style="bold"),
                percent(scores.get("accuracy_shuffled_images")),
                percent(scores.get("majority")),
                "–" if scores.get("n") is None else f"{scores['n']:,}",
                end_section=row == len(tasks) - 1,
            )
    return shown


def percent(share: float | None) -> str:
    """`0.6312` -> `"63.1 %"`; a dash for what was not measured."""
    return "–" if share is None or not math.isfinite(share) else f"{share:.1%}".replace("%", " %")
