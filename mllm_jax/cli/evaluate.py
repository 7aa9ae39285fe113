"""`mllm evaluate`: scores a run."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tyro

from mllm_jax.cli.caches import keep_compiled_programs
from mllm_jax.cli.console import console
from mllm_jax.cli.runs import experiment_of, use_cpu_devices

ENOUGH = 30  # questions, below which an accuracy is uncertain by more than 18 points


@dataclass(frozen=True)
class Evaluate:
    """Scores a run by its own config's evaluation.

    Attributes:
        run: a folder that `mllm train` made.
        tasks: only these tasks.
    """

    run: tyro.conf.Positional[Path]
    tasks: tuple[str, ...] | None = None


def run(arguments: list[str]) -> int:
    options = tyro.cli(Evaluate, args=arguments, prog="mllm evaluate")
    keep_compiled_programs()
    use_cpu_devices(experiment_of(options.run))
    evaluate(options.run, options.tasks)
    return 0


def evaluate(run: Path, tasks: tuple[str, ...] | None = None) -> None:
    import jax

    from mllm_jax.evaluation.run import evaluate_run
    from mllm_jax.evaluation.tables import table

    results = evaluate_run(run, tasks=tasks)
    if jax.process_index() == 0:
        console().print(table(results))
        if note := _few_questions(results):
            print(note)
        print(run / "report.html")


def _few_questions(results: Mapping[str, Any]) -> str | None:
    """What to say where tasks are so small that their accuracies mean little; None where they are not."""
    counts = [found.get("n") for found in results.values()]
    if not counts or None in counts or max(counts) >= ENOUGH:
        return None
    return f"toy size: at most {max(counts)} questions a task, so these accuracies mean little"
