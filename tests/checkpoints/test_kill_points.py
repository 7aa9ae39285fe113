"""A run that dies at any file operation of naming a checkpoint and deleting old ones keeps its checkpoints."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import jax.numpy as jnp
import pytest

from mllm_jax.checkpoints import folder as folder_module
from mllm_jax.checkpoints import training
from mllm_jax.checkpoints.folder import new_folder
from mllm_jax.checkpoints.training import TrainingCheckpoints
from mllm_jax.errors import CheckpointError

OPERATIONS = ("mkdir", "rename", "replace", "unlink", "remove", "rmdir")
KEEP = 2


class Death(BaseException):
    """An exception that nothing catches, like SIGKILL; no file operation succeeds after it."""


class Dying:
    """A patch that allows `count` file operations; `done` is the number performed."""

    def __init__(self, count: int):
        self.count, self.done = count, 0

    def __enter__(self):
        self.real = {name: getattr(os, name) for name in OPERATIONS}
        for name, real in self.real.items():
            setattr(os, name, lambda *args, real=real, **options: self.operation(real, *args, **options))
        return self

    def operation(self, real, *args, **options):
        if self.done == self.count:
            raise Death
        self.done += 1
        return real(*args, **options)

    def __exit__(self, kind, *_):
        for name, real in self.real.items():
            setattr(os, name, real)
        self.died = kind is Death
        return self.died


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Returns sealed checkpoints 2, 4, 6 and 8, to be copied."""
    folder = tmp_path_factory.mktemp("made")
    with TrainingCheckpoints(folder, keep_last=9) as checkpoints:
        for step in (2, 4, 6, 8):
            checkpoints.save(step, {"x": jnp.full(64, step)}, {"step": step})
    return folder


def save(folder: Path, made: Path, step: int, monkeypatch, dies_at: int) -> bool:
    """Starts and saves this step, with copied arrays instead of written ones; returns True if it died."""

    def begin(target, *_):
        temporary = target.with_name(target.name + folder_module.WRITING)
        shutil.rmtree(temporary, ignore_errors=True)
        shutil.copytree(made / target.name, temporary)
        dying.done = 0  # earlier operations are tested elsewhere
        dying.count = dies_at
        return lambda: folder_module._publish(temporary, target)

    monkeypatch.setattr(training, "begin", begin)
    with Dying(10_000) as dying:
        TrainingCheckpoints(folder, keep_last=KEEP, enable_async=False).save(step, {}, {})
    return dying.died


def loadable(folder: Path) -> list[int]:
    """Returns the steps that a next start could use, with every byte checked."""
    steps = TrainingCheckpoints(folder, keep_last=KEEP).steps()
    assert all(folder_module.damage(folder / f"{step:08d}", deep=True) is None for step in steps)
    return steps


@pytest.mark.parametrize("have, first, second", [((2, 4), 6, 8), ((2, 4), 6, 6), ((4, 6), 6, 6), ((4, 6), 6, 8)])
def test_dying_once_and_again_loses_no_checkpoint(tmp_path, made, monkeypatch, have, first, second):
    """Checks new steps, which delete the oldest, and steps that replace existing ones."""
    deaths, named = 0, False
    for once in range(1000):
        folder = tmp_path / f"{once}"
        for step in have:
            shutil.copytree(made / f"{step:08d}", folder / f"{step:08d}")
        died = save(folder, made, first, monkeypatch, once)
        after = loadable(folder)
        assert set(after) >= set(have[1:]) and (named <= (first in after)), f"death {once}: {after}"
        named = first in after  # and permanently from then on
        must = sorted({*have, *after})[-KEEP:]
        assert after[-KEEP:] == must
        if not died:
            break
        deaths += 1
        for again in range(once % 8, 1000, 8):
            other = tmp_path / "other"
            shutil.copytree(folder, other)
            died = save(other, made, second, monkeypatch, again)
            found = loadable(other)
            assert found[-KEEP:] == sorted({*must, *found})[-KEEP:], f"deaths {once}, {again}: {found}"
            shutil.rmtree(other)
            if not died:
                assert found == sorted({*must, second})[-KEEP:]  # all remains are deleted
                break
            deaths += 1
        shutil.rmtree(folder)
    assert named and deaths > 20


def test_a_model_that_was_being_replaced_is_found_again(tmp_path):
    target, absent = tmp_path / "model", 0
    for count in range(1000):
        for path in tmp_path.iterdir():
            shutil.rmtree(path)
        with new_folder(target, 10) as temporary:
            (temporary / "model.json").write_text("old")
        with Dying(count) as dying, new_folder(target, 10, overwrite=True) as temporary:
            (temporary / "model.json").write_text("new")
        absent += not target.exists()
        with pytest.raises(CheckpointError, match="not empty"), new_folder(target, 10):
            pass
        assert (target / "model.json").read_text() in ("old", "new")[not dying.died :]
        if not dying.died:
            break
    assert absent, "no death between the two renames: the test shows nothing"


def test_a_model_that_cannot_be_replaced_stays(tmp_path, monkeypatch):
    target, rename = tmp_path / "model", os.rename
    with new_folder(target, 10) as temporary:
        (temporary / "model.json").write_text("old")

    def failing(source, to):
        if str(source).endswith(folder_module.WRITING):
            raise OSError("no")
        rename(source, to)

    monkeypatch.setattr(os, "rename", failing)
    with pytest.raises(OSError, match="no"), new_folder(target, 10, overwrite=True) as temporary:
        (temporary / "model.json").write_text("new")
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
    assert (target / "model.json").read_text() == "old"
