"""Evaluation: a model is asked the questions of tasks, and what comes of it is kept in a folder."""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax

from mllm_jax.data.images import as_picture
from mllm_jax.errors import ConfigError, DataError, RunFolderError
from mllm_jax.evaluation.task import BATCH, EvaluationTask, Measured, Prediction
from mllm_jax.files import parse_json, write_atomic
from mllm_jax.generation.assistant import Assistant

SHOWN = 4  # examples of each task that a report shows
SIDE = 256  # pixels of an image there, at most
AGAIN = "remove the file, and evaluate again to write it anew"

Results = dict[str, dict[str, float]]  # task -> metric -> value


def evaluate(
    assistant: Assistant,
    task: EvaluationTask,
    *,
    limit: int | None = None,
    out: str | Path | None = None,
    batch_size: int = BATCH,
) -> dict[str, float]:
    """Asks a model the questions of a task.

    Args:
        limit: only the first so many examples.
        out: a folder for predictions.jsonl, one line an example: index, id, task, question, answer, reference,
            correct. Lines of other tasks in it stay.
        batch_size: questions that are answered together.

    Returns:
        {metric: value}. A control that cannot be made, as of a single question, is left out.

    Raises:
        ConfigError: a model that cannot be asked so. DataError: an example that cannot be read or asked.
        RunFolderError: the folder cannot be written.
    """
    measured = measure(assistant, [task], limit=limit, batch_size=batch_size)
    if out is not None and jax.process_index() == 0:
        write_predictions(Path(out), measured)
    return measured[task.name].values


def measure(
    assistant: Assistant, tasks: Sequence[EvaluationTask], *, limit: int | None = None, batch_size: int = BATCH
) -> dict[str, Measured]:
    """Asks a model the questions of several tasks: what was measured, by the tasks' names."""
    if limit is not None and limit < 1:
        raise ConfigError(f"a limit of {limit} examples", "at least 1, or none", "change the limit")
    return {task.name: task.evaluate(assistant, limit=limit, batch_size=batch_size) for task in tasks}


def values_of(measured: Mapping[str, Measured]) -> Results:
    return {task: each.values for task, each in measured.items()}


# ---- what is kept; of tasks that were not measured now, what a file holds stays


def write_results(folder: Path, measured: Mapping[str, Measured]) -> None:
    """Writes results.json: {task: {metric: value}}."""
    path = folder / "results.json"
    write(path, json.dumps((stored(path, dict) or {}) | values_of(measured), indent=1) + "\n")


def write_predictions(folder: Path, measured: Mapping[str, Measured]) -> None:
    """Writes predictions.jsonl."""
    path = folder / "predictions.jsonl"
    lines = [
        parse_json(line, f"{path}, line {number}", DataError, todo=AGAIN)
        for number, line in enumerate(path.read_bytes().splitlines() if path.is_file() else [], start=1)
    ]
    lines = [line for line in lines if line.get("task") not in measured]
    lines += [_line(task, prediction) for task, each in measured.items() for prediction in each.predictions]
    write(path, "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines))


def write_examples(folder: Path, measured: Mapping[str, Measured]) -> None:
    """Writes examples.json: the first predictions of each task with their images, for the report."""
    path = folder / "examples.json"
    kept = [each for each in stored(path, list) or [] if isinstance(each, dict) and each.get("task") not in measured]
    shown = [(task, prediction) for task, each in measured.items() for prediction in each.predictions[:SHOWN]]
    now = [
        _line(task, prediction) | {"image_png_base64": [image_png(image) for image in prediction.images]}
        for task, prediction in shown
    ]
    write(path, json.dumps(kept + now, indent=1) + "\n")


def stored(path: Path, kind: type) -> Any:
    """The content of a JSON file, None if there is no such file. Raises DataError: it is not of this kind."""
    return parse_json(path.read_bytes(), str(path), DataError, kind, todo=AGAIN) if path.is_file() else None


def _line(task: str, prediction: Prediction) -> dict[str, Any]:
    return {
        "index": prediction.index,
        "id": prediction.id,
        "task": task,
        "question": prediction.question,
        "answer": prediction.answer,
        "reference": prediction.reference,
        "correct": prediction.correct,
    }


def write(path: Path, text: str) -> None:
    """Writes a whole file or none, in a folder that is made if it is absent.

    Raises:
        RunFolderError: no permission or no room; what was there before stays.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(path, text)
    except OSError as error:
        todo = "free space or permit writing, then evaluate again"
        raise RunFolderError(f"{path}: {error.strerror or error}", "a folder that can be written", todo) from error


def image_png(source: Any) -> str:
    """An image as PNG in base64, made smaller where it is large."""
    from PIL import Image

    image, buffer = Image.fromarray(as_picture(source)), io.BytesIO()
    image.thumbnail((SIDE, SIDE))
    image.save(buffer, "PNG")
    return base64.b64encode(buffer.getvalue()).decode()
