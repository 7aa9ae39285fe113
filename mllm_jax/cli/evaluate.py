"""`mllm evaluate`: scores a run."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import tyro

from mllm_jax.cli.console import console
from mllm_jax.cli.runs import experiment_of, use_cpu_devices


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
        print(run / "report.html")
