"""Evaluates a run folder: results.json, examples.json, predictions.jsonl and report.html."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax

from mllm_jax.checkpoints.run import RunFolder, read_json
from mllm_jax.errors import ConfigError, TooFewError
from mllm_jax.evaluation.evaluate import PREDICTIONS, lines, measure, read_predictions, write_predictions
from mllm_jax.evaluation.report import write_report
from mllm_jax.evaluation.shown_media import encoded
from mllm_jax.generation.assistant import Assistant
from mllm_jax.models.run_weights import load_run
from mllm_jax.training.evaluation import BATCH, Evaluation, Measured, Prediction
from mllm_jax.training.operations.run_folder import holding, write_json

SHOWN = 4  # examples of a task in the report


def evaluate_run(
    run_dir: Path,
    *,
    tasks: Sequence[str] | None = None,
    devices: Sequence[jax.Device] | None = None,
    batch_size: int = BATCH,
) -> dict[str, dict[str, float]]:
    """Evaluates a run on the tasks of its config and writes the results into its folder.

    Leaves out tasks with too few examples to measure and prints their names.

    Args:
        tasks: names of tasks, or the part of a name before or after the "/"; None: all. Results of other tasks in the
            folder are kept.

    Returns:
        {task: {metric: value}} of the tasks that were measured.

    Raises:
        ConfigError: the config has no tasks, or not all of these.
        TooFewError: none of the tasks has enough examples.
    """
    folder = RunFolder(Path(run_dir))
    # Refuse all that can be refused before the model is loaded, which takes seconds.
    known, chosen = _asked(folder, tasks)
    with holding(folder.path):
        _, model, params, processor, mesh = load_run(folder, devices)
        assistant = Assistant(model, params, processor, mesh=mesh)
        measured = _measured(assistant, chosen, batch_size)
        results = {name: found.metrics for name, found in measured.items()}
        if jax.process_index() == 0:
            said = [line for name, found in measured.items() for line in lines(name, found.predictions)]
            shown = [_example(name, one) for name, found in measured.items() for one in found.predictions[:SHOWN]]
            path = folder.path
            write_predictions(path / PREDICTIONS, _merged(known, results, read_predictions(path / PREDICTIONS), said))
            before = _json(path / "examples.json", list)
            write_json(path / "examples.json", _merged(known, results, before, shown))
            everything = _json(path / "results.json", dict) | results
            write_json(path / "results.json", {name: everything[name] for name in known if name in everything})
            write_report(path)
    return results


def _measured(assistant: Assistant, tasks: Sequence[Evaluation], batch_size: int) -> dict[str, Measured]:
    """Measures the tasks that have enough examples; raises TooFewError if none has."""
    measured: dict[str, Measured] = {}
    scant: dict[str, tuple[list[str], TooFewError]] = {}
    for task in tasks:
        try:
            measured[task.name] = measure(assistant, task, batch_size=batch_size)
        except TooFewError as error:
            scant.setdefault(str(error), ([], error))[0].append(task.name)
    for names, error in scant.values():
        if not measured:
            raise error
        if jax.process_index() == 0:
            print(f"left out {', '.join(names)}: {error.given}; {error.todo}")
    return measured


def _asked(folder: RunFolder, tasks: Sequence[str] | None) -> tuple[list[str], list[Evaluation]]:
    """Returns the names of all tasks of a run, and the selected tasks."""
    evaluation: Sequence[Evaluation] = folder.experiment().evaluation
    if not evaluation:
        raise ConfigError(
            f"{folder.path}: a run whose config has no tasks in `evaluation`",
            "tasks, or questions of your own",
            "give --questions FILE, or add tasks to the config and train again into the same folder",
        )
    known = [task.name for task in evaluation]
    if tasks is None:
        return known, list(evaluation)
    unknown = sorted(wanted for wanted in set(tasks) if not any(_means(wanted, name) for name in known))
    if unknown or not tasks:
        raise ConfigError(f"tasks {unknown}", f"some of {', '.join(known)}", "change --tasks")
    return known, [task for task in evaluation if any(_means(wanted, task.name) for wanted in tasks)]


def _means(wanted: str, name: str) -> bool:
    return wanted == name or name.startswith(f"{wanted}/") or name.endswith(f"/{wanted}")


def _merged(known: Sequence[str], again: dict[str, Any], before: list[dict], now: list[dict]) -> list[dict]:
    """Returns the entries of both lists in the tasks' order; of tasks that were measured again, only those of `now`."""
    order = {name: place for place, name in enumerate(known)}
    kept = [entry for entry in before if entry.get("task") in order and entry["task"] not in again]
    return sorted([*kept, *now], key=lambda entry: order[entry["task"]])


def _json(path: Path, kind: type) -> Any:
    """Reads a result of an earlier evaluation of the same parameters; training that changes them removes it."""
    return read_json(path, kind) if path.is_file() else kind()


def _example(task: str, said: Prediction) -> dict:
    """Returns a prediction as the report shows it, with its media."""
    return {
        "task": task,
        **encoded(said.media),
        "question": said.question,
        "answer": said.answer,
        "reference": said.reference,
        "correct": said.correct,
    }
