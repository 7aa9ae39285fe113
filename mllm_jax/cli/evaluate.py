"""`mllm evaluate`: scores a run by its own tasks, or any model by a file of questions."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import tyro

from mllm_jax.checkpoints.native import is_native
from mllm_jax.checkpoints.run import is_run
from mllm_jax.cli.caches import keep_compiled_programs
from mllm_jax.cli.console import console
from mllm_jax.cli.runs import assistant_of, experiment_of, use_cpu_devices
from mllm_jax.errors import ConfigError

ENOUGH = 30  # questions; with fewer, an accuracy is uncertain by more than 18 points


@dataclass(frozen=True)
class EvaluateCommand:
    """Scores a run by its own config's tasks, or any model by a file of questions.

    Attributes:
        run: a folder that `mllm train` made; with --questions also a model's folder, from Hugging Face or `mllm
            convert`.
        tasks: only these tasks of the run.
        questions: a .json or .jsonl file of records {question, image or images, answer, choices, id}.
        media: the folder of the images that the questions name; default: the file's own folder.
        limit: number of questions to use, from the first on.
        out: a folder for predictions.jsonl and results.json of the questions.
    """

    run: tyro.conf.Positional[Path]
    tasks: tuple[str, ...] | None = None
    questions: Path | None = None
    media: Path | None = None
    limit: int | None = None
    out: Path | None = None

    def __post_init__(self):
        given = [f"--{name}" for name in ("media", "limit", "out") if getattr(self, name) is not None]
        if self.questions is None and given:
            raise ConfigError(
                f"{', '.join(given)} without --questions", "--questions FILE", "name a file, or drop these options"
            )
        if self.limit is not None and self.limit < 1:
            raise ConfigError(f"limit {self.limit}", "at least 1", "change --limit")
        if self.questions is not None and self.tasks is not None:
            raise ConfigError("--tasks with --questions", "either of them", "drop one of the two")
        if self.out is not None and is_run(self.out):
            raise ConfigError(
                f"--out {self.out}, a run's folder", "a folder of its own", "name another: it would replace results"
            )


def run(arguments: list[str]) -> int:
    options = tyro.cli(EvaluateCommand, args=arguments, prog="mllm evaluate")
    keep_compiled_programs()
    if options.questions is not None:
        return ask(options)
    if not is_run(options.run) and (is_native(options.run) or any(options.run.glob("*.safetensors"))):
        raise ConfigError(
            f"{options.run}, a model's folder, without questions", "a run, or --questions FILE", "give --questions FILE"
        )
    use_cpu_devices(experiment_of(options.run))
    evaluate(options.run, options.tasks)
    return 0


def ask(options: EvaluateCommand) -> int:
    from mllm_jax.evaluation.evaluate import evaluate as measured
    from mllm_jax.evaluation.tasks.questions import questions_task
    from mllm_jax.training.operations.run_folder import write_json

    # Checks the questions before loading the weights.
    task = questions_task(options.questions, options.media, options.questions.stem, limit=options.limit)
    found = {task.name: measured(assistant_of(options.run), task, limit=options.limit, out=options.out)}
    _show(found)
    if options.out is not None:
        write_json(options.out / "results.json", found)
        print(options.out / "predictions.jsonl")
    return 0


def evaluate(run: Path, tasks: tuple[str, ...] | None = None) -> None:
    import jax

    from mllm_jax.evaluation.run import evaluate_run

    results = evaluate_run(run, tasks=tasks)
    if jax.process_index() == 0:
        _show(results)
        print(run / "report.html")


def _show(results: Mapping[str, Mapping[str, float]]) -> None:
    from mllm_jax.evaluation.tables import table

    console().print(table(results))
    if note := _few_questions(results):
        print(note)


def _few_questions(results: Mapping[str, Mapping[str, float]]) -> str | None:
    """Returns a note about tasks with too few questions for a meaningful accuracy; None if there are none."""
    counts = [found["n"] for found in results.values() if "n" in found]
    if not counts or max(counts) >= ENOUGH:
        return None
    return f"toy size: at most {max(counts)} questions a task, so these accuracies mean little"
