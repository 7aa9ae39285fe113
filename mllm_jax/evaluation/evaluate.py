"""Evaluates a model by a task, and writes down what it said."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

import jax

from mllm_jax.checkpoints.run import read_json_lines
from mllm_jax.errors import ConfigError, RunFolderError
from mllm_jax.files import write_atomic
from mllm_jax.generation.assistant import Assistant
from mllm_jax.training.evaluation import BATCH, Evaluation, Measured, Prediction

PREDICTIONS = "predictions.jsonl"


def evaluate(
    assistant: Assistant, task: Evaluation, *, limit: int | None = None, out: str | Path | None = None
) -> dict[str, float]:
    """Evaluates a model by a task.

    Args:
        limit: only the first `limit` examples.
        out: a folder for predictions.jsonl: of each example the task, its index or id, the question, the answer, and
            where they are known the reference and whether the answer is correct. Those of other tasks stay in it.

    Returns:
        {metric: value}

    Raises:
        ConfigError: a model that cannot be asked so, or a limit below 1.
        DataError: the task's source or metrics refuse, or have nothing to measure.
        RunFolderError: predictions that cannot be written.
    """
    writes = out is not None and jax.process_index() == 0
    if writes:  # a folder that cannot be made is no reason to lose the answers
        try:
            Path(out).mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise _unwritable(Path(out), error) from error
        others = [line for line in read_predictions(Path(out) / PREDICTIONS) if line.get("task") != task.name]
    measured = measure(assistant, task, limit=limit)
    if writes:
        write_predictions(Path(out) / PREDICTIONS, others + lines(task.name, measured.predictions))
    return measured.metrics


def measure(assistant: Assistant, task: Evaluation, *, limit: int | None = None, batch_size: int = BATCH) -> Measured:
    """Evaluates a model by a task that is checked before; see `evaluate`."""
    if limit is not None and limit < 1:
        raise ConfigError(f"limit {limit}", "at least 1", "change the limit")
    task.check(assistant.model.config)
    return task.measure(assistant, limit=limit, batch_size=batch_size)


def lines(task: str, predictions: Iterable[Prediction]) -> list[dict]:
    """Predictions as predictions.jsonl holds them."""
    found = []
    for one in predictions:
        line = {"task": task, "index" if isinstance(one.id, int) else "id": one.id}
        line |= {"question": one.question, "answer": one.answer}
        line |= {} if one.reference is None else {"reference": one.reference}
        found.append(line | ({} if one.correct is None else {"correct": one.correct}))
    return found


def read_predictions(path: Path) -> list[dict]:
    """The lines of a predictions.jsonl, none where there is no file. Raises RunFolderError: another file."""
    return read_json_lines(path, "remove the file, and evaluate again")


def write_predictions(path: Path, found: Iterable[dict]) -> None:
    """Writes a whole file of JSON lines or none. Raises RunFolderError: it cannot be written."""
    try:
        write_atomic(path, "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in found))
    except OSError as error:
        raise _unwritable(path, error) from error


def _unwritable(path: Path, error: OSError) -> RunFolderError:
    return RunFolderError(
        f"{path}: {error.strerror or error}", "a folder that can be written", "free space, or name another folder"
    )
