"""The folder of a run: its config, tokenizer, checkpoints, metrics and report."""

from __future__ import annotations

import contextlib
import hashlib
import json
import re
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from mllm_jax import files
from mllm_jax.checkpoints.description import describe, rebuild
from mllm_jax.data.tokenizer import Tokenizer
from mllm_jax.errors import MllmError, RunFolderError
from mllm_jax.sharding.hosts import first_alone
from mllm_jax.training.config import Experiment
from mllm_jax.training.operations.run_lock import MARK, held, unwritable
from mllm_jax.training.serialise import binding_differences

KIND = f"{Experiment.__module__}:{Experiment.__qualname__}"
MEASURED = ("results.json", "examples.json", "report.html")
FOLDERS = ("initial", "stages", "checkpoints", "tensorboard", "processor", "features", "lengths", "hangs", "profile")
FILES = ("config.json", "run.json", "metrics.jsonl", "goodput.json", *MEASURED)
WRITTEN = (*FOLDERS, *FILES)
UNDERWAY = tuple(f".{name}" for name in WRITTEN)  # how the names begin of what is being written or removed
STAGE = re.compile(r"\d+-.+")  # what a stage's folders are called
STEP = re.compile(r"\d{8,}")  # and its checkpoints
RESTORE = "restore the file, or start over with --fresh"


@dataclass(frozen=True)
class RunFolder:
    """Names of what lies in a run folder."""

    path: Path

    @property
    def config_file(self) -> Path:
        return self.path / "config.json"

    @property
    def tokenizer_file(self) -> Path:
        return self.processor_folder / "tokenizer.json"

    @property
    def processor_folder(self) -> Path:
        """The tokenizer, its chat template and what else prepares the model's input."""
        return self.path / "processor"

    @property
    def initial(self) -> Path:
        """The weights that the run began with, see `training.weights`."""
        return self.path / "initial"

    @property
    def features(self) -> Path:
        """Encoder features that stages keep."""
        return self.path / "features"

    @property
    def lengths(self) -> Path:
        """Measured lengths, where several processes share them."""
        return self.path / "lengths"

    @property
    def goodput(self) -> Path:
        """The account of where the run's time went."""
        return self.path / "goodput.json"

    @property
    def hangs(self) -> Path:
        """Where every thread stood when a process hung."""
        return self.path / "hangs"

    @property
    def profile(self) -> Path:
        """Traces of `--profile`."""
        return self.path / "profile"

    def checkpoints(self, index: int, stage: str) -> Path:
        return self.path / "checkpoints" / f"{index}-{stage}"

    def snapshot(self, index: int, stage: str) -> Path:
        """The parameters a stage trained, as they stood at its end."""
        return self.path / "stages" / f"{index}-{stage}"

    def described(self) -> dict:
        """What config.json says of the experiment.

        Raises:
            RunFolderError: no run here, or its config.json cannot be read.
        """
        if not self.config_file.is_file():
            raise RunFolderError(f"{self.path}: no config.json", "a folder that `mllm train` made", "check the path")
        described = read_json(self.config_file)
        if described.get("class") != KIND:
            raise _no_experiment(self.config_file)
        return described

    def experiment(self) -> Experiment:
        """The experiment that the folder holds.

        Raises:
            RunFolderError: no run here, or its config.json cannot be read.
            ConfigError: a config that this version does not know.
        """
        described = self.described()
        try:
            return rebuild(described)
        except MllmError:
            raise
        except Exception as error:  # a class that is a number, a list where a config belongs: any kind
            raise _no_experiment(self.config_file) from error

    def is_trained(self) -> bool:
        """Whether there is a run here that has ended a stage; a model's folder has a config.json too, but no stages."""
        return bool(_names(self.path / "stages", STAGE.fullmatch))

    def begun(self) -> int:
        """How many stages, from the first on, have ended or taken a checkpoint: 0 where there is nothing to lose."""
        stages, checkpoints = self.path / "stages", self.path / "checkpoints"
        names = _names(stages, STAGE.fullmatch)
        names += [name for name in _names(checkpoints, STAGE.fullmatch) if _names(checkpoints / name, STEP.fullmatch)]
        return max([1 + int(name.partition("-")[0]) for name in names], default=0)

    def unfinished(self, experiment: Experiment) -> list[str]:
        """The names of the stages from the first on that has not ended."""
        ended = [self.snapshot(index, stage.name).is_dir() for index, stage in enumerate(experiment.stages)]
        return [stage.name for stage in experiment.stages[(*ended, False).index(False) :]]

    def tokenizer(self) -> Tokenizer:
        """The tokenizer that was trained for the run."""
        return Tokenizer.load(self.processor_folder)


def words_of(folder: RunFolder) -> dict[str, str]:
    """Gives a checksum of each file that says how text and media become ids: the tokenizer's or the processor's."""
    files = [
        file for file in folder.processor_folder.rglob("*") if file.is_file() and file.name != "generation_config.json"
    ]
    return {str(file.relative_to(folder.path)): hashlib.sha256(file.read_bytes()).hexdigest() for file in files}


def _is_ours(name: str) -> bool:
    return name.removesuffix(".tmp") in WRITTEN or name.startswith(UNDERWAY)


def _names(path: Path, wanted: Callable[[str], object]) -> list[str]:
    return sorted(p.name for p in path.iterdir() if wanted(p.name)) if path.is_dir() else []


def is_ours(folder: RunFolder) -> bool:
    """Whether the folder has our mark, or the config.json of an experiment: many programs write a config.json."""
    if (folder.path / MARK).is_file():
        return True
    try:
        folder.described()
    except RunFolderError:
        return False
    return True


def _remove_run(folder: RunFolder) -> None:
    """Removes what a run wrote but its config, from a folder with our mark and from no other."""
    if not is_ours(folder):
        raise RunFolderError(
            f"{folder.path}: a config.json of no run, beside {_names(folder.path, 'config.json'.__ne__)[:5]}",
            "a folder that `mllm train` made",
            "choose another --run-dir, or clear the folder yourself",
        )
    for target in [folder.path / name for name in _names(folder.path, _is_ours)]:
        if target == folder.config_file:
            continue  # the new one replaces it: at no instant is the folder without one
        if target.name in ("stages", "checkpoints") and not target.is_symlink():
            for stage in _names(target, STAGE.fullmatch):
                _remove(target / stage, folder.path)
            with contextlib.suppress(OSError):  # what else lies there is somebody's, and stays
                target.rmdir()
        else:
            _remove(target, folder.path)


def _remove(target: Path, run: Path) -> None:
    if target.is_dir() and not target.is_symlink():
        # First out of the way: half a folder must not be taken for a whole one if this is cut off.
        if not target.name.startswith("."):
            name = ".".join(target.relative_to(run).parts)
            target = target.rename(run / f".{name}.removed.{time.time_ns()}")
        shutil.rmtree(target)
    else:
        target.unlink()


def write_json(path: Path, value: Any) -> None:
    """Writes a whole file or none.

    Raises:
        RunFolderError: no permission or no room; what stood there before stays.
    """
    try:
        files.write_atomic(path, json.dumps(value, indent=1) + "\n")
    except OSError as error:
        raise unwritable(path, error) from error


def read_json(path: Path, kind: type = dict) -> Any:
    """A JSON file of a run; `kind` is what it must hold.

    Raises:
        RunFolderError: it cannot be read, or holds something else.
    """
    try:
        value = files.read_json(path, RunFolderError, object)
    except OSError as error:
        raise RunFolderError(f"{path}: {error}", "a JSON file that can be read", RESTORE) from error
    if not isinstance(value, kind):
        raise RunFolderError(f"{path} holds a {type(value).__name__}", f"a {kind.__name__} as JSON", RESTORE)
    return value


def _no_experiment(path: Path) -> RunFolderError:
    return RunFolderError(
        f"{path} describes no experiment",
        "the config.json of a run",
        "choose the folder of a run, or restore the file",
    )


def open_run(path: Path, experiment: Experiment, *, fresh: bool = False) -> RunFolder:
    """Makes the folder, or takes up the run that it holds. Of several processes the first writes, and all must see it.

    Stages that have not begun may change; a run of which none has ended or taken a checkpoint gives way to any config.

    Args:
        fresh: remove an earlier run first. Only what a run writes is removed, from a folder that has our mark.

    Raises:
        RunFolderError: the folder holds another experiment's run or other files, cannot be written, or is not the same
            for all processes.
    """
    folder = RunFolder(Path(path))
    first_alone(partial(_take_up, folder, experiment, fresh))
    if not folder.config_file.is_file():
        raise RunFolderError(
            f"{folder.path}, which the first process has made and this one does not see",
            "one folder for all processes, on a disk or bucket that every host mounts",
            "choose another --run-dir",
        )
    return folder


@contextlib.contextmanager
def holding(path: Path) -> Iterator[None]:
    """Keeps every other process from writing the run folder until the block ends; of several processes the first does.

    Raises:
        RunFolderError: another process holds it, or it cannot be written. A folder that is not a run's is left alone.
    """
    with contextlib.ExitStack() as lock:
        first_alone(lambda: lock.enter_context(held(path)) if _may_be_ours(RunFolder(Path(path))) else None)
        yield


def _may_be_ours(folder: RunFolder) -> bool:
    """Makes the folder if it is absent; whether it is a run's or empty. Any other is refused by `open_run`."""
    try:
        folder.path.mkdir(parents=True, exist_ok=True)
        return is_ours(folder) or not _strangers(folder)
    except OSError as error:
        raise unwritable(folder.path, error) from error


def _strangers(folder: RunFolder) -> list[str]:
    return _names(folder.path, lambda name: not name.startswith(UNDERWAY) and name != MARK)


def _take_up(folder: RunFolder, experiment: Experiment, fresh: bool) -> None:
    described = describe(experiment)
    try:
        if folder.config_file.is_file():
            if fresh:
                _remove_run(folder)
            elif changed := binding_differences(folder.described(), described, begun := folder.begun() or None):
                if begun:
                    raise _another(folder, changed)
                _remove_run(folder)  # it ended before there was anything to lose
        elif strangers := _strangers(folder):
            raise RunFolderError(
                f"{folder.path} holds {strangers[:5]} and no run", "an empty or new folder", "choose another --run-dir"
            )
        folder.path.mkdir(parents=True, exist_ok=True)
        (folder.path / MARK).touch()
        # What may change (the mesh, say) is kept up to date.
        write_json(folder.config_file, described)
        if folder.unfinished(experiment):
            for name in MEASURED:  # of parameters that are about to change
                (folder.path / name).unlink(missing_ok=True)
    except OSError as error:
        raise unwritable(folder.path, error) from error


def _another(folder: RunFolder, changed: list[str]) -> RunFolderError:
    shown = "\n  ".join(changed[:10]) + (f"\n  ... {len(changed) - 10} more" if len(changed) > 10 else "")
    return RunFolderError(
        f"{folder.path} holds a run of another config:\n  {shown}",
        "the config the run was started with",
        "choose another --run-dir, undo the change, or start over with --fresh",
    )
