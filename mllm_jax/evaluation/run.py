"""The evaluation of a run folder: results.json, examples.json, report.html and the table in the terminal."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import jax

from mllm_jax.checkpoints.run import RunFolder, read_json
from mllm_jax.errors import ConfigError
from mllm_jax.evaluation.report import write_report
from mllm_jax.models.run_weights import load_run
from mllm_jax.training.operations.run_folder import holding, write_json


class Evaluation(Protocol):
    """What `Experiment.evaluation` may be: a frozen dataclass with these methods."""

    def check(self, model: Any) -> None:
        """Raises ConfigError if a model of this config cannot be asked so."""

    def questions(self) -> dict[str, list]:
        """{split: [anything with a `task`]}"""

    def score(self, splits: dict[str, list], model, params, processor, mesh, batch_size: int) -> tuple[dict, list]:
        """The results of such questions, and examples for the report; see `evaluate`."""


def evaluate_run(
    run_dir: Path,
    *,
    tasks: Sequence[str] | None = None,
    devices: Sequence[jax.Device] | None = None,
    batch_size: int = 64,
) -> dict:
    """Evaluates a run by its own config and writes what it finds into the folder.

    Args:
        tasks: only these; None: all that the config's evaluation has. What the folder holds of others stays.

    Returns:
        The results of these tasks, as `evaluate` and `evaluate_retrieval` give them.

    Raises:
        ConfigError: the config has no evaluation, or not all of these tasks.
    """
    folder = RunFolder(Path(run_dir))
    # What can be refused is refused before the model is loaded, which takes seconds.
    evaluation, splits = _asked(folder, tasks)
    with holding(folder.path):
        before = _measured(folder) if tasks is not None else ({"splits": {}}, [])
        _, model, params, processor, mesh = load_run(folder, devices)
        results, examples = evaluation.score(splits, model, params, processor, mesh, batch_size)
        if jax.process_index() == 0:
            results_after, examples_after = _merged(before, (results, examples))
            write_json(folder.path / "results.json", results_after)
            write_json(folder.path / "examples.json", examples_after)
            write_report(folder.path)
    return results


def _asked(folder: RunFolder, tasks: Sequence[str] | None) -> tuple[Evaluation, dict[str, list]]:
    experiment = folder.experiment()
    if experiment.evaluation is None:
        raise ConfigError(
            f"{folder.path}: a config without evaluation", "an `evaluation` in it", "add one and run again"
        )
    splits = experiment.evaluation.questions()
    if tasks is None:
        return experiment.evaluation, splits
    known = sorted({q.task for questions in splits.values() for q in questions})
    unknown = sorted(set(tasks) - set(known))
    if unknown or not tasks:
        raise ConfigError(f"tasks {unknown}", f"some of {known}", "change --tasks")
    chosen = {name: [q for q in questions if q.task in tasks] for name, questions in splits.items()}
    return experiment.evaluation, chosen


def _measured(folder: RunFolder) -> tuple[dict, list]:
    """What an earlier evaluation of the same parameters left; the training that changes them removes it."""
    results, examples = folder.path / "results.json", folder.path / "examples.json"
    return (
        read_json(results) if results.is_file() else {"splits": {}},
        read_json(examples, list) if examples.is_file() else [],
    )


def _merged(before: tuple[dict, list], now: tuple[dict, list]) -> tuple[dict, list]:
    """Results and examples of both, where tasks of a split were measured twice those of `now`."""
    splits = {
        split: dict(sorted({**before[0]["splits"].get(split, {}), **now[0]["splits"].get(split, {})}.items()))
        for split in {**before[0]["splits"], **now[0]["splits"]}
    }
    again = {(split, task) for split, scores in now[0]["splits"].items() for task in scores}
    kept = [example for example in before[1] if (example["split"], example["task"]) not in again]
    return {"splits": splits}, kept + now[1]
