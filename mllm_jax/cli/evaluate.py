"""`mllm evaluate`: asks a model questions, and scores its answers."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import tyro

from mllm_jax.checkpoints.run import is_run
from mllm_jax.cli.assistants import assistant_of
from mllm_jax.cli.caches import keep_compiled_programs
from mllm_jax.cli.console import console
from mllm_jax.cli.runs import experiment_of, use_cpu_devices
from mllm_jax.errors import ConfigError
from mllm_jax.evaluation.evaluate import Results, measure, values_of, write_predictions, write_results
from mllm_jax.evaluation.run import evaluate_run
from mllm_jax.evaluation.tables import table
from mllm_jax.evaluation.task import Task
from mllm_jax.evaluation.tasks.questions import questions_task

ENOUGH = 30  # questions, below which an accuracy is uncertain by more than 18 points


@dataclass(frozen=True)
class Evaluate:
    """Scores a run by its own config's tasks, or any model by questions of your own.

    Attributes:
        model: a folder that `mllm train` made, or a model's: Hugging Face's, or what `mllm convert` wrote.
        tasks: of a run's tasks only these, by name or by what follows the last `/` of it.
        questions: a .json or .jsonl file of questions, see `mllm_jax.Questions`; they are asked instead.
        media: the folder of the questions' images.
        limit: only the first so many questions of each task.
        out: a folder for results.json and predictions.jsonl; a run's own are in its folder.
    """

    model: tyro.conf.Positional[Path]
    tasks: tuple[str, ...] | None = None
    questions: Path | None = None
    media: Path | None = None
    limit: int | None = None
    out: Path | None = None

    def __post_init__(self):
        if self.questions is None and self.media is not None or self.questions is not None and self.tasks is not None:
            what = "--tasks with --questions" if self.questions else "--media without --questions"
            raise ConfigError(what, "--questions FILE with --media DIR, or --tasks of a run", "leave one out")
        if self.limit is not None and self.limit < 1:
            raise ConfigError(f"--limit {self.limit}", "at least 1", "change it")


def run(arguments: list[str]) -> int:
    options = tyro.cli(Evaluate, args=arguments, prog="mllm evaluate")
    # The questions first: a bad record should not have to wait for the weights.
    own = None if options.questions is None else (questions_task(options.questions, options.media),)
    for task in own or ():
        task.examples(options.limit)
    keep_compiled_programs()
    if is_run(options.model):
        if options.out is not None:
            raise ConfigError(f"--out for the run {options.model}", "results in the run's own folder", "leave it out")
        use_cpu_devices(experiment_of(options.model))
        show(options.model, evaluate_run(options.model, tasks=options.tasks, own=own, limit=options.limit))
    else:
        _show(_evaluate_folder(options, own))
    return 0


def _evaluate_folder(options: Evaluate, own: tuple[Task, ...] | None) -> Results:
    """Evaluates the model of a folder, which is no run."""
    if own is None:
        raise ConfigError(
            f"{options.model}: a folder that is no run, without --questions",
            "a run, whose config has tasks, or questions of your own",
            "add --questions FILE, and --media DIR for its images",
        )
    measured = measure(assistant_of(options.model), own, limit=options.limit)
    if options.out is not None:
        for keep in (write_results, write_predictions):
            keep(options.out, measured)
    return values_of(measured)


def show(run: Path, results: Results) -> None:
    """Prints the results of a run, and where its report is."""
    import jax

    if jax.process_index() == 0:
        _show(results)
        print(run / "report.html")


def _show(results: Results) -> None:
    console().print(table(results))
    counts = [values.get("n") for values in results.values()]
    if counts and None not in counts and max(counts) < ENOUGH:
        print(f"toy size: at most {max(counts)} questions a task, so these accuracies mean little")
