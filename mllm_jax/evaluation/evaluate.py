"""Evaluates a model on a task and writes its predictions."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

import jax

from mllm_jax.errors import ConfigError, RunFolderError
from mllm_jax.evaluation.task import BATCH, Evaluation, Measured, Prediction
from mllm_jax.files import parse_json, write_atomic
from mllm_jax.generation.assistant import Assistant

PREDICTIONS = "predictions.jsonl"


def evaluate(
    assistant: Assistant, task: Evaluation, *, limit: int | None = None, out: str | Path | None = None
) -> dict[str, float]:
    """Evaluates a model on a task.

    Args:
        limit: evaluates only the first `limit` examples.
        out: folder for predictions.jsonl: for each example the task, its index or id, the question, the answer and, if
            known, the reference and whether the answer is correct. Predictions of other tasks are kept.

    Returns:
        {metric: value}

    Raises:
        ConfigError: the task does not suit the model, or the limit is below 1.
        DataError: the task's source or metrics refuse, or there is nothing to measure.
        RunFolderError: the predictions cannot be written.
    """
    writes = out is not None and jax.process_index() == 0
    if writes:  # before the evaluation, so that a folder that cannot be made does not lose the answers
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
    """Evaluates a model on a task that is already checked; see `evaluate`."""
    if limit is not None and limit < 1:
        raise ConfigError(f"limit {limit}", "at least 1", "change the limit")
    task.check(assistant.model.config)
    return task.measure(assistant, limit=limit, batch_size=batch_size)


def lines(task: str, predictions: Iterable[Prediction]) -> list[dict]:
    """Returns predictions as the records of predictions.jsonl."""
    found = []
    for one in predictions:
        line = {"task": task, "index" if isinstance(one.id, int) else "id": one.id}
        line |= {"question": one.question, "answer": one.answer}
        line |= {} if one.reference is None else {"reference": one.reference}
        found.append(line | ({} if one.correct is None else {"correct": one.correct}))
    return found


def read_predictions(path: Path) -> list[dict]:
    """Reads a predictions.jsonl; returns [] if there is none. Raises RunFolderError: another kind of file."""
    if not path.is_file():
        return []
    todo = "remove the file, and evaluate again"
    return [
        parse_json(line, f"{path}, line {number}", RunFolderError, todo=todo)
        for number, line in enumerate(path.read_bytes().split(b"\n"), start=1)
        if line
    ]


def write_predictions(path: Path, found: Iterable[dict]) -> None:
    """Writes a file of JSON lines, whole or not at all. Raises RunFolderError: it cannot be written."""
    try:
        write_atomic(path, "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in found))
    except OSError as error:
        raise _unwritable(path, error) from error


def _unwritable(path: Path, error: OSError) -> RunFolderError:
    return RunFolderError(
        f"{path}: {error.strerror or error}", "a folder that can be written", "free space, or name another folder"
    )
