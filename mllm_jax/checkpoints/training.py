"""The checkpoints of a run: saved in the background, pruned, restored from the newest sound one; snapshots."""

from __future__ import annotations

import math
import re
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import jax

from mllm_jax.checkpoints.fingerprint import check_fingerprint, compare_fingerprints, fingerprint
from mllm_jax.checkpoints.folder import (
    REPLACED,
    WRITING,
    Background,
    ReadFailure,
    agree,
    begin,
    damage,
    discard,
    make_writable,
    read,
    record,
    recover,
    together,
)
from mllm_jax.checkpoints.leaves import PyTree
from mllm_jax.errors import CheckpointError, ConfigError
from mllm_jax.sharding.hosts import from_first

__all__ = [
    "TrainingCheckpoints",
    "check_fingerprint",
    "compare_fingerprints",
    "fingerprint",
    "load_snapshot",
    "save_snapshot",
    "snapshot_meta",
]


class TrainingCheckpoints:
    """The checkpoints of one run folder: saved in the background, pruned, and restored from the newest sound one.

    Args:
        folder: the folder of the step folders; made if absent. One run writes to it at a time; any number may read.
        keep_last: number of newest steps that are kept.
        keep_best: name of the metric whose best step is kept as well; None keeps by age only.
        best_mode: whether a smaller or a larger metric is better.
        enable_async: False makes `save` return only when the checkpoint is complete.

    `notes` collects texts on what was worked around (a damaged checkpoint that was skipped, one that could not be
    deleted); the training loop prints them. Call `close` (or leave the `with` block) before the interpreter ends.

    Raises:
        CheckpointError: the folder cannot be made or written.
        ConfigError: `keep_last` below one or an unknown `best_mode`.
    """

    def __init__(
        self,
        folder: Path,
        *,
        keep_last: int = 3,
        keep_best: str | None = None,
        best_mode: Literal["min", "max"] = "min",
        enable_async: bool = True,
    ):
        if keep_last < 1:
            raise ConfigError(f"keep_last={keep_last}", "at least 1", "keep one checkpoint or more")
        if best_mode not in ("min", "max"):
            raise ConfigError(f"best_mode={best_mode!r}", "'min' or 'max'", "choose one of the two")
        self.folder = Path(folder).absolute()
        self.keep_last, self.enable_async = keep_last, enable_async
        self.keep_best, self.best_mode = keep_best, best_mode
        self.notes: list[str] = []
        self._damaged: dict[int, str] = {}
        self._background: Background | None = None
        make_writable(self.folder)
        for replaced in self.folder.glob(f"*{REPLACED}"):
            recover(replaced.with_name(replaced.name.removesuffix(REPLACED)))

    def __enter__(self) -> TrainingCheckpoints:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # ---- writing

    def save(
        self, step: int, state: Mapping[str, PyTree], meta: dict[str, Any], metrics: dict[str, float] | None = None
    ) -> None:
        """Starts writing `state` and `meta` as checkpoint `step`; the arrays may be donated as soon as it returns.

        First waits for the previous save and raises its error, if any, without starting this save.

        Args:
            step: not negative; a checkpoint of the same step is replaced.
            state: named trees of arrays, such as `{"params": …, "opt_state": …}`; empty containers cost nothing.
            meta: JSON (string keys, lists for tuples), given back equal by `restore`.
            metrics: values for `keep_best`; None means that this step is not a candidate for the best.

        Raises:
            CheckpointError: not enough disk space, no permission, or a leaf or meta that cannot be stored.
        """
        self.wait()
        if step < 0:
            raise CheckpointError(f"step {step}", "a step that is not negative", "count steps from 0")
        if metrics is not None and self.keep_best is not None and self.keep_best not in metrics:
            raise CheckpointError(
                f"metrics {sorted(metrics)} of step {step}",
                f"the metric {self.keep_best!r}, by which the best checkpoint is kept",
                "report it, pass metrics=None for a step without evaluation, or change keep_best",
            )
        target = self._path(step)
        extra = {"step": step, "metrics": {k: float(v) for k, v in (metrics or {}).items()}}
        write = begin(target, dict(state), meta, extra)

        def work() -> None:
            write()
            self._damaged.pop(step, None)
            if jax.process_index() == 0:
                self._prune(step)

        if self.enable_async:
            self._background = Background(work)
        else:
            together(work)

    def wait(self) -> None:
        """Waits until the last save is complete on every process; raises CheckpointError if it failed."""
        background, self._background = self._background, None
        if background is not None:
            together(background.result)

    def close(self) -> None:
        """Waits for the save in progress; raises CheckpointError if it failed."""
        self.wait()

    # ---- reading

    def steps(self) -> list[int]:
        """Returns the complete steps, ascending: every file has its size. Only `restore` checks the content."""
        return [s for s in self._candidates() if s not in self._damaged and damage(self._path(s), deep=False) is None]

    def latest(self) -> int | None:
        """Returns the newest complete step, or None."""
        steps = self.steps()
        return steps[-1] if steps else None

    def best(self) -> int | None:
        """Returns the complete step with the best finite `keep_best` metric (the newest among equals), or None."""
        sign = 1 if self.best_mode == "max" else -1
        scored = []
        for step in self.steps():
            try:
                value = record(self._path(step))["metrics"].get(self.keep_best)
            except (ValueError, KeyError) as error:  # sizes match, content does not
                self._damaged[step] = f"its record cannot be read: {error}"
                continue
            if value is not None and math.isfinite(value):
                scored.append((sign * value, step))
        return max(scored)[1] if scored else None

    def restore(
        self, abstract_state: Mapping[str, PyTree], step: int | None = None
    ) -> tuple[int, dict[str, PyTree], dict[str, Any]]:
        """Reads a checkpoint onto the devices that `abstract_state` names, whatever mesh it was written from.

        Args:
            abstract_state: trees of `jax.ShapeDtypeStruct` (or arrays) with `.sharding`; a leaf without one comes back
                uncommitted on the default device. A whole entry of the state may be left out, a part of one may not.
            step: the only step to read; None takes the newest sound one, and warns about each step that is skipped.

        Returns:
            The step, the state, and the meta it was saved with.

        Raises:
            CheckpointError: no sound checkpoint, the requested step is absent or damaged, or the trees do not match
                (all differing leaves are counted, the first ten named).
        """
        self.wait()
        abstract = dict(abstract_state)
        if step is not None:
            if not self._path(step).exists():
                raise CheckpointError(
                    f"step {step} in {self.folder}", f"one of the steps {self.steps()}", "choose a step that exists"
                )
            reason, found = self._try(step, abstract)
            if found is None:
                raise CheckpointError(
                    f"{self._path(step)}: {reason}",
                    "a complete checkpoint",
                    f"name no step, to take the newest sound one, or one of {self.steps()}",
                )
            return step, *found
        candidates, unfinished = from_first([self._candidates(), self._unfinished()])
        refused = [(s, "its save was interrupted") for s in unfinished]
        for candidate in reversed(candidates):
            reason, found = self._try(candidate, abstract)
            if found is not None:
                for s, why in sorted(refused):
                    if s > candidate:
                        self._note(f"checkpoint of step {s} not used: {why}; using step {candidate} of {self.folder}")
                return candidate, *found
            refused.append((candidate, reason))
        raise CheckpointError(
            f"no usable checkpoint in {self.folder}" + "".join(f"\n    step {s}: {why}" for s, why in sorted(refused)),
            "at least one complete checkpoint",
            "choose another run folder, or start the run again",
        )

    # ---- inside

    def _path(self, step: int) -> Path:
        return self.folder / f"{step:08d}"

    def _candidates(self) -> list[int]:
        return sorted(int(p.name) for p in self.folder.iterdir() if re.fullmatch(r"\d{8,}", p.name))

    def _unfinished(self) -> list[int]:
        found = (re.fullmatch(rf"(\d{{8,}}){re.escape(WRITING)}", p.name) for p in self.folder.iterdir())
        return sorted(int(m[1]) for m in found if m)

    def _try(self, step: int, abstract: dict[str, PyTree]) -> tuple[str, tuple[dict, dict] | None]:
        """Returns (why not, None) or ("", state and meta). Process 0 reads every byte; all must agree to use it."""
        path, found = self._path(step), None
        reason = damage(path, deep=True) if jax.process_index() == 0 else None
        if agree(reason is None):
            try:
                found = read(path, abstract, "entries")
            except ReadFailure as failure:
                reason = str(failure)
            if agree(reason is None):
                return "", found
        self._damaged[step] = reason or "another process found it unusable"
        return self._damaged[step], None

    def _prune(self, newest: int) -> None:
        steps = self.steps()
        keep = {newest, *steps[-self.keep_last :]}
        if self.keep_best is not None and (best := self.best()) is not None:
            keep.add(best)
        old = [self._path(s) for s in self._candidates() if s not in keep and s < max(keep)]
        old += [self.folder / f"{s:08d}{WRITING}" for s in self._unfinished()]
        old += self.folder.glob(f"*{REPLACED}")  # complete ones among them got their name back at the start
        for path in old:
            try:
                discard(path)
            except OSError as error:
                self._note(f"an old checkpoint could not be deleted: {error}")

    def _note(self, text: str) -> None:
        self.notes.append(text)
        warnings.warn(text, stacklevel=3)


def save_snapshot(folder: Path, tree: PyTree, meta: dict[str, Any]) -> None:
    """Writes a tree of arrays and its JSON `meta` as one permanent folder; returns when it is complete.

    An existing folder is replaced, and stays readable until the new one is complete. Raises CheckpointError.
    """
    folder = Path(folder).absolute()
    make_writable(folder.parent)
    recover(folder)
    write = begin(folder, tree, meta, {})
    together(write)


def load_snapshot(folder: Path, abstract_tree: PyTree, *, whole: bool = True) -> tuple[PyTree, dict[str, Any]]:
    """Reads a snapshot of `save_snapshot`: the tree on the shardings of `abstract_tree`, and the meta.

    Unless `whole`, `abstract_tree` is a dict that may leave out leaves.

    Raises CheckpointError: absent, incomplete or damaged, or the leaves differ from `abstract_tree`.
    """
    folder = _sound_snapshot(folder, deep=True)
    try:
        return read(folder, abstract_tree, "" if whole else "leaves")
    except ReadFailure as failure:
        raise _bad_snapshot(folder, str(failure)) from failure


def snapshot_meta(folder: Path) -> dict[str, Any]:
    """Returns the meta of a snapshot without reading its arrays. Raises CheckpointError if it is damaged."""
    return record(_sound_snapshot(folder, deep=False))["meta"]


def _sound_snapshot(folder: Path, deep: bool) -> Path:
    folder = Path(folder).absolute()
    recover(folder)
    reason = damage(folder, deep) if jax.process_index() == 0 else None
    if not agree(reason is None):
        raise _bad_snapshot(folder, reason or "process 0 found it damaged")
    return folder


def _bad_snapshot(folder: Path, reason: str) -> CheckpointError:
    return CheckpointError(
        f"snapshot {folder}: {reason}", "a complete snapshot", "run the stage that writes it again, or restore a copy"
    )
