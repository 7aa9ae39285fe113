"""The evaluation of a run folder: results.json, predictions.jsonl, examples.json and report.html."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax

from mllm_jax.checkpoints.run import RunFolder
from mllm_jax.errors import ConfigError
from mllm_jax.evaluation.evaluate import Results, measure, values_of, write_examples, write_predictions, write_results
from mllm_jax.evaluation.report import write_report
from mllm_jax.evaluation.task import BATCH, EvaluationTask
from mllm_jax.generation.assistant import Assistant
from mllm_jax.models.run_weights import load_run
from mllm_jax.training.operations.run_folder import holding


def evaluate_run(
    run_dir: Path,
    *,
    tasks: Sequence[str] | None = None,
    own: Sequence[EvaluationTask] | None = None,
    limit: int | None = None,
    devices: Sequence[jax.Device] | None = None,
    batch_size: int = BATCH,
) -> Results:
    """Evaluates a run and writes what it finds into the folder, where results of other tasks stay.

    Args:
        tasks: of the config's tasks only these, each by its name or the end of it after a `/`; None: all.
        own: these tasks instead of the config's.
        limit: only the first so many examples of each.

    Returns:
        The results of these tasks: {task: {metric: value}}.

    Raises:
        ConfigError: no tasks, not all of those that are named, or a model that cannot be asked so.
    """
    folder = RunFolder(Path(run_dir))
    # What can be refused is refused before the model is loaded, which takes seconds.
    asked = _asked(folder, tasks, own)
    with holding(folder.path):
        _, model, params, processor, mesh = load_run(folder, devices)
        measured = measure(Assistant(model, params, processor, mesh=mesh), asked, limit=limit, batch_size=batch_size)
        if jax.process_index() == 0:
            for keep in (write_results, write_predictions, write_examples):
                keep(folder.path, measured)
            write_report(folder.path)
    return values_of(measured)


def _asked(
    folder: RunFolder, tasks: Sequence[str] | None, own: Sequence[EvaluationTask] | None
) -> Sequence[EvaluationTask]:
    experiment: Any = folder.experiment()
    if own is not None:
        for task in own:
            task.check(experiment.model)
        return own
    if not experiment.evaluation:
        raise ConfigError(
            f"{folder.path}: a run whose config has no tasks",
            "tasks in `evaluation` of its config, or questions of your own",
            "add --questions FILE, or add tasks to the config and start `mllm train` again: it only evaluates then",
        )
    if tasks is None:
        return experiment.evaluation
    ends = {task.name: {task.name, task.name.rpartition("/")[2]} for task in experiment.evaluation}
    unknown = sorted(set(tasks).difference(*ends.values()))
    if unknown or not tasks:
        known = sorted({name.rpartition("/")[2] for name in ends})
        raise ConfigError(f"tasks {unknown}", f"some of {known}, or of {sorted(ends)}", "change --tasks")
    return [task for task in experiment.evaluation if ends[task.name].intersection(tasks)]
