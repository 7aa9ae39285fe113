"""The folder of a run: its config, tokenizer, checkpoints, metrics and report."""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import dataclass
from pathlib import Path

from mllm_jax.data.tokenizer import Tokenizer
from mllm_jax.errors import RunFolderError
from mllm_jax.training.config import Experiment
from mllm_jax.training.serialise import binding_differences, describe, rebuild


@dataclass(frozen=True)
class RunFolder:
    """Names of what lies in a run folder."""

    path: Path

    @property
    def config_file(self) -> Path:
        return self.path / "config.json"

    @property
    def tokenizer_file(self) -> Path:
        return self.path / "tokenizer.json"

    def checkpoints(self, index: int, stage: str) -> Path:
        return self.path / "checkpoints" / f"{index}-{stage}"

    def snapshot(self, index: int, stage: str) -> Path:
        """The parameters a stage trained, as they stood at its end."""
        return self.path / "stages" / f"{index}-{stage}"

    def experiment(self) -> Experiment:
        """The experiment that the folder holds.

        Raises:
            RunFolderError: no run here, or its config.json cannot be read.
        """
        if not self.config_file.is_file():
            raise RunFolderError(f"{self.path}: no config.json", "a folder that `mllm train` made", "check the path")
        return rebuild(read_json(self.config_file))

    def tokenizer(self) -> Tokenizer:
        return Tokenizer.load(self.tokenizer_file)


WRITTEN = (
    "config.json",
    "tokenizer.json",
    "run.json",
    "results.json",
    "examples.json",
    "metrics.jsonl",
    "report.html",
) + ("checkpoints", "stages", "tensorboard")


def _remove_run(path: Path) -> None:
    for name in WRITTEN:
        target = path / name
        if target.is_dir():
            shutil.rmtree(target)
        else:
            target.unlink(missing_ok=True)


def write_json(path: Path, value) -> None:
    """Writes a whole file or none."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_text(json.dumps(value, indent=1) + "\n")
    os.replace(temporary, path)


def read_json(path: Path):
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise RunFolderError(f"{path}: {error}", "a JSON file that can be read", "restore it or start over") from error


def open_run(path: Path, experiment: Experiment, *, fresh: bool = False, writer: bool = True) -> RunFolder:
    """Makes the folder, or takes up the run that it holds.

    Args:
        fresh: remove an earlier run first. Only what a run writes is removed.
        writer: False on all hosts but the first, which reads only.

    Raises:
        RunFolderError: the folder holds another experiment's run or other files, or cannot be written.
    """
    folder = RunFolder(Path(path))
    if not writer:
        return folder
    described = describe(experiment)
    try:
        if fresh and folder.config_file.is_file():
            _remove_run(folder.path)
        folder.path.mkdir(parents=True, exist_ok=True)
        if not folder.config_file.is_file():
            strangers = sorted(p.name for p in folder.path.iterdir())
            if strangers:
                raise RunFolderError(
                    f"{folder.path} holds {strangers[:5]} and no run",
                    "an empty or new folder",
                    "choose another --run-dir",
                )
            write_json(folder.config_file, described)
            return folder
        changed = binding_differences(read_json(folder.config_file), described)
        if changed:
            shown = "\n  ".join(changed[:10]) + (f"\n  ... {len(changed) - 10} more" if len(changed) > 10 else "")
            raise RunFolderError(
                f"{folder.path} holds a run of another config:\n  {shown}",
                "the config the run was started with",
                "choose another --run-dir, undo the change, or start over with --fresh",
            )
        # What may change (the mesh, say) is kept up to date.
        write_json(folder.config_file, described)
    except OSError as error:
        raise RunFolderError(
            f"{folder.path}: {error}", "a folder that can be written", "choose another --run-dir"
        ) from error
    return folder
