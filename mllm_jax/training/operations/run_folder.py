"""The folder of a run: its config, tokenizer, checkpoints, metrics and report."""

from __future__ import annotations

import contextlib
import json
import shutil
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

from mllm_jax import files
from mllm_jax.checkpoints.description import describe
from mllm_jax.checkpoints.differences import binding_differences
from mllm_jax.checkpoints.run import STAGE, RunFolder, names_in
from mllm_jax.errors import MllmError, RunFolderError
from mllm_jax.sharding.hosts import first_alone
from mllm_jax.training.config import Experiment
from mllm_jax.training.operations.changes import changes_of, described_changes, record_changes
from mllm_jax.training.operations.run_lock import MARK, held, unwritable

MEASURED = ("results.json", "examples.json", "predictions.jsonl", "report.html")
FOLDERS = ("initial", "stages", "checkpoints", "tensorboard", "processor", "features", "lengths", "hangs", "profile")
FILES = ("config.json", "run.json", "metrics.jsonl", "goodput.json", "changes.jsonl", "wandb.json", *MEASURED)
WRITTEN = (*FOLDERS, *FILES)
UNDERWAY = tuple(f".{name}" for name in WRITTEN)  # prefixes of names that are being written or removed


def _is_ours(name: str) -> bool:
    return name.removesuffix(".tmp") in WRITTEN or name.startswith(UNDERWAY)


def is_ours(folder: RunFolder) -> bool:
    """Returns whether the folder has our mark or an experiment's config.json, a name that other programs use too."""
    if (folder.path / MARK).is_file():
        return True
    try:
        folder.described()
    except RunFolderError:
        return False
    return True


def _remove_run(folder: RunFolder) -> None:
    """Removes everything that a run wrote except its config, only from a folder with our mark."""
    if not is_ours(folder):
        raise RunFolderError(
            f"{folder.path}: a config.json of no run, beside {names_in(folder.path, 'config.json'.__ne__)[:5]}",
            "a folder that `mllm train` made",
            "choose another --run-dir, or clear the folder yourself",
        )
    for target in [folder.path / name for name in names_in(folder.path, _is_ours)]:
        if target == folder.config_file:
            continue  # the new one replaces it, so that the folder always has one
        if target.name in ("stages", "checkpoints") and not target.is_symlink():
            for stage in names_in(target, STAGE.fullmatch):
                _remove(target / stage, folder.path)
            with contextlib.suppress(OSError):  # other files in it are the user's, and stay
                target.rmdir()
        else:
            _remove(target, folder.path)


def _remove(target: Path, run: Path) -> None:
    if target.is_dir() and not target.is_symlink():
        # Renamed first: if this is interrupted, half a folder must not look like a whole one.
        if not target.name.startswith("."):
            name = ".".join(target.relative_to(run).parts)
            target = target.rename(run / f".{name}.removed.{time.time_ns()}")
        shutil.rmtree(target)
    else:
        target.unlink()


def write_json(path: Path, value: Any) -> None:
    """Writes a whole file, or nothing.

    Raises:
        RunFolderError: no permission or no room; the earlier file stays.
    """
    try:
        files.write_atomic(path, json.dumps(value, indent=1) + "\n")
    except OSError as error:
        raise unwritable(path, error) from error


def open_run(
    path: Path, experiment: Experiment, *, fresh: bool = False, say: Callable[[str], None] = lambda line: None
) -> RunFolder:
    """Makes the folder, or opens the run in it. Only the first process writes; all processes must see the folder.

    Stages that have not begun may change. In the last stage that has begun, only fields that nothing but its remaining
    steps depends on may change; the change is recorded. Any config may replace that of a run without a checkpoint and
    without a finished stage.

    Args:
        fresh: remove an earlier run first: only files that a run writes, from a folder that has our mark.
        say: called on the first process with each line about the changes.

    Raises:
        RunFolderError: the folder holds another experiment's run or other files, cannot be written, or is not the same
            for all processes.
    """
    folder = RunFolder(Path(path))
    first_alone(partial(_take_up, folder, experiment, fresh, say))
    if not folder.config_file.is_file():
        raise RunFolderError(
            f"{folder.path}, which the first process has made and this one does not see",
            "one folder for all processes, on a disk or bucket that every host mounts",
            "choose another --run-dir",
        )
    return folder


@contextlib.contextmanager
def holding(path: Path) -> Iterator[None]:
    """Keeps other runs from writing the run folder until the block ends; the first process of the run does it.

    Raises:
        RunFolderError: another process holds it, or it cannot be written. A folder that is not a run's is left alone.
    """
    with contextlib.ExitStack() as lock:
        first_alone(lambda: lock.enter_context(held(path)) if _may_be_ours(RunFolder(Path(path))) else None)
        yield


def _may_be_ours(folder: RunFolder) -> bool:
    """Makes the folder if it is absent; returns whether it is a run's or empty. `open_run` refuses any other."""
    try:
        folder.path.mkdir(parents=True, exist_ok=True)
        return is_ours(folder) or not _strangers(folder)
    except OSError as error:
        raise unwritable(folder.path, error) from error


def _strangers(folder: RunFolder) -> list[str]:
    return names_in(folder.path, lambda name: not name.startswith(UNDERWAY) and name != MARK)


def _take_up(folder: RunFolder, experiment: Experiment, fresh: bool, say: Callable[[str], None]) -> None:
    described, changes = describe(experiment), []
    try:
        if folder.config_file.is_file():
            if fresh:
                _remove_run(folder)
            else:
                changes = _go_on(folder, experiment, described)
        elif strangers := _strangers(folder):
            raise RunFolderError(
                f"{folder.path} holds {strangers[:5]} and no run", "an empty or new folder", "choose another --run-dir"
            )
        folder.path.mkdir(parents=True, exist_ok=True)
        (folder.path / MARK).touch()
        record_changes(folder, changes)  # first: if this start is interrupted here, the next one finds them again
        # Fields that may change, such as the mesh, are kept up to date.
        write_json(folder.config_file, described)
        if folder.unfinished(experiment):
            for name in MEASURED:  # results of parameters that are about to change
                (folder.path / name).unlink(missing_ok=True)
    except OSError as error:
        raise unwritable(folder.path, error) from error
    for line in described_changes(changes, experiment):
        say(line)


def _go_on(folder: RunFolder, experiment: Experiment, described: dict) -> list[dict[str, Any]]:
    """Finds the changes to the run in the folder; removes a run of another config that has trained nothing yet.

    Raises:
        RunFolderError: another experiment's run.
    """
    before, begun = _described_today(folder), folder.begun() or None
    if changed := binding_differences(before, described, begun):
        if begun:
            raise _another(folder, changed)
        _remove_run(folder)
    elif begun:
        return changes_of(folder, before, described, experiment, begun)
    return []


def _described_today(folder: RunFolder) -> dict:
    """Describes the config in the folder, with the defaults of fields that are newer than it."""
    described = folder.described()
    try:
        return describe(folder.experiment())
    except MllmError:  # an older version, or a module that is gone: the differences name it
        return described


def _another(folder: RunFolder, changed: list[str]) -> RunFolderError:
    shown = "\n  ".join(changed[:10]) + (f"\n  ... {len(changed) - 10} more" if len(changed) > 10 else "")
    return RunFolderError(
        f"{folder.path} holds a run of another config:\n  {shown}",
        "the config the run was started with",
        "choose another --run-dir, undo the change, or start over with --fresh",
    )
