"""A run folder: the paths of its files, and the experiment that it holds."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mllm_jax import files
from mllm_jax.checkpoints.description import rebuild
from mllm_jax.errors import MllmError, RunFolderError

KIND = "mllm_jax.training.config:Experiment"
STAGE = re.compile(r"\d+-.+")  # names of a stage's folders
STEP = re.compile(r"\d{8,}")  # and its checkpoints
RESTORE = "restore the file, or start over with --fresh"
GENERATION = "generation_config.json"  # it has options of generation, not the meaning of the weights


def _inside(*names: str) -> Any:
    """Returns a property with the path of a file or folder inside a run."""
    return property(lambda folder: folder.path.joinpath(*names))


@dataclass(frozen=True)
class RunFolder:
    """The paths of the files in a run folder."""

    path: Path

    config_file = _inside("config.json")
    processor_folder = _inside("processor")  # the tokenizer, its chat template and other files that prepare the input
    tokenizer_file = _inside("processor", "tokenizer.json")
    initial = _inside("initial")  # the weights that the run began with, see `training.weights`
    features = _inside("features")  # encoder features that stages keep
    lengths = _inside("lengths")  # measured lengths, where several processes share them
    goodput = _inside("goodput.json")  # the account of the run's time
    hangs = _inside("hangs")  # the stack of every thread when a process hung
    profile = _inside("profile")  # traces of `--profile`

    def checkpoints(self, index: int, stage: str) -> Path:
        return self.path / "checkpoints" / f"{index}-{stage}"

    def snapshot(self, index: int, stage: str) -> Path:
        """Returns the folder of the parameters that a stage trained, at its end."""
        return self.path / "stages" / f"{index}-{stage}"

    def described(self) -> dict:
        """Returns the experiment as described in config.json.

        Raises:
            RunFolderError: no run here, or its config.json cannot be read.
        """
        if not self.config_file.is_file():
            raise RunFolderError(f"{self.path}: no config.json", "a folder that `mllm train` made", "check the path")
        described = read_json(self.config_file)
        if described.get("class") != KIND:
            raise _no_experiment(self.config_file)
        return described

    def experiment(self) -> Any:
        """Returns the experiment that the folder holds.

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
        """Returns whether the folder is a run that has ended a stage; a model's folder has no stages."""
        return bool(names_in(self.path / "stages", STAGE.fullmatch))

    def begun(self) -> int:
        """Returns the number of first stages that have ended or saved a checkpoint; 0 if there is nothing to lose."""
        stages, checkpoints = self.path / "stages", self.path / "checkpoints"
        names = names_in(stages, STAGE.fullmatch)
        names += [
            name for name in names_in(checkpoints, STAGE.fullmatch) if names_in(checkpoints / name, STEP.fullmatch)
        ]
        return max([1 + int(name.partition("-")[0]) for name in names], default=0)

    def unfinished(self, experiment: Any) -> list[str]:
        """Returns the names of the stages from the first unfinished one on."""
        ended = [self.snapshot(index, stage.name).is_dir() for index, stage in enumerate(experiment.stages)]
        return [stage.name for stage in experiment.stages[(*ended, False).index(False) :]]


def is_run(folder: Path) -> bool:
    """Returns whether a folder holds a training run, finished or not."""
    try:
        RunFolder(folder).described()
    except RunFolderError:
        return False
    return True


def words_of(folder: RunFolder) -> dict[str, str]:
    """Returns a checksum of each file of the tokenizer or processor, which turn text and media into ids."""
    files = [file for file in folder.processor_folder.rglob("*") if file.is_file() and file.name != GENERATION]
    return {str(file.relative_to(folder.path)): hashlib.sha256(file.read_bytes()).hexdigest() for file in files}


def names_in(path: Path, wanted: Callable[[str], object]) -> list[str]:
    return sorted(p.name for p in path.iterdir() if wanted(p.name)) if path.is_dir() else []


def read_json(path: Path, kind: type = dict) -> Any:
    """Reads a JSON file of a run that holds a `kind`.

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
