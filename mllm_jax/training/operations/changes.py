"""Changes of a run's config between two starts: checked before anything is written, then kept in changes.jsonl."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from mllm_jax.checkpoints.differences import Difference, recorded_differences
from mllm_jax.checkpoints.run import RunFolder, read_json_lines
from mllm_jax.errors import RunFolderError
from mllm_jax.files import write_atomic
from mllm_jax.training.config import Experiment

SHOWN = 200  # characters of a value on the screen


def changes_of(folder: RunFolder, old: dict, new: dict, experiment: Experiment, begun: int) -> list[dict[str, Any]]:
    """Finds the changes of a run that continues, as changes.jsonl has them: stage, step, field, from, to.

    Args:
        begun: number of stages that have begun; `step` counts in the last of them.

    Raises:
        RunFolderError: fewer steps than are done, or more for a stage without its optimizer state.
    """
    index, stage = begun - 1, experiment.stages[begun - 1]
    done = folder.steps_done(index, stage.name)
    found = recorded_differences(old, new, begun)
    if steps := next((one for one in found if one.field == f"stages.{index}.steps"), None):
        _check_steps(folder, index, stage.name, steps, done)
    return [{"stage": stage.name, "step": done, "field": one.field, "from": one.old, "to": one.new} for one in found]


def _check_steps(folder: RunFolder, index: int, name: str, steps: Difference, done: int) -> None:
    if steps.new < done:
        raise RunFolderError(
            f"{folder.path}: {steps}, where stage {name} has done {done}",
            f"at least {done} steps",
            "raise the steps, choose another --run-dir, or start over with --fresh",
        )
    where = folder.checkpoints(index, name)
    if folder.is_ended(index, name) and steps.new > done and not folder.checkpoint_steps(index, name):
        raise RunFolderError(
            f"{folder.path}: {steps}, without a checkpoint in {where}",
            "the optimizer's state at the end of the stage, from which more steps continue",
            "restore that folder, or begin another run with Pretrained(..., stage=...)",
        )


def record_changes(folder: RunFolder, changes: Sequence[dict[str, Any]]) -> None:
    """Appends changes to changes.jsonl, atomically, unless it ends with them already."""
    before = read_json_lines(folder.changes)
    if changes and before[-len(changes) :] != list(changes):
        lines = [json.dumps(line, ensure_ascii=False) + "\n" for line in [*before, *changes]]
        write_atomic(folder.changes, "".join(lines))


def described_changes(changes: Sequence[dict[str, Any]], experiment: Experiment) -> list[str]:
    """Returns the lines that a start prints about the changes."""
    if not changes:
        return []
    name, step = changes[0]["stage"], changes[0]["step"]
    stage = next(stage for stage in experiment.stages if stage.name == name)
    lines = [f"stage {name} continues from step {step} with another config, kept in changes.jsonl:"]
    lines += [f"  {one['field']}: {_short(one['from'])} -> {_short(one['to'])}" for one in changes]
    fields = {one["field"].split(".", 2)[-1] for one in changes if one["field"].startswith("stages.")}
    if "steps" in fields:
        lines.append(_about_steps(stage.steps, step, stage.optimizer.schedule))
    if "data.rows" in fields:
        lines.append(
            "  with other rows the data continues at its position; a few examples may come twice or not at all"
        )
    return lines


def _about_steps(steps: int, done: int, schedule: str) -> str:
    if schedule == "cosine":
        return (
            f"  the learning rate depends on the number of steps (schedule cosine): the result differs from a"
            f" run planned with {steps} steps from the beginning; after step {done} it follows the cosine of {steps}"
        )
    return f"  the learning rate does not depend on the number of steps (schedule {schedule})"


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= SHOWN else f"{text[:SHOWN]}..."
