"""Metrics to Weights & Biases, for `mllm train --wandb PROJECT`; the package is optional."""

from __future__ import annotations

import importlib
import secrets
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mllm_jax.checkpoints.description import describe
from mllm_jax.checkpoints.run import read_json
from mllm_jax.errors import ConfigError
from mllm_jax.training.operations.run_folder import write_json

FILE = "wandb.json"


def require_wandb() -> Any:
    """Imports the package.

    Raises:
        ConfigError: it is not installed.
    """
    try:
        module = importlib.import_module("wandb")
    except ImportError:
        module = None
    if not hasattr(module, "init"):  # absent, or a folder `wandb` of earlier runs in the current folder
        raise ConfigError("--wandb without the package wandb", "wandb", "pip install 'mllm-jax[wandb]'")
    return module


class Wandb:
    """A `Sink`: one W&B run for each run folder, which keeps its id, so that a resumed run resumes there too.

    Args:
        project: name of the W&B project.

    Raises:
        ConfigError: the package wandb is not installed, or refuses the run.
    """

    def __init__(self, project: str):
        self.project, self._wandb, self._run = project, require_wandb(), None

    def begin(self, experiment: Any, folder: Path) -> None:
        file = folder / FILE
        known = read_json(file) if file.is_file() else {}
        if known.get("project") != self.project:
            known = {"project": self.project, "id": secrets.token_hex(8)}
            write_json(file, known)
        try:
            self._run = self._wandb.init(
                project=self.project, id=known["id"], name=experiment.name, config=describe(experiment), resume="allow"
            )
        except Exception as error:  # its own classes, for example without an account or a network
            raise ConfigError(
                f"wandb.init: {type(error).__name__}: {error}",
                f"a login that may write to the project {self.project}",
                "run `wandb login`, set WANDB_MODE=offline, or leave --wandb out",
            ) from error
        # W&B's own step must never decrease, but a run that resumes repeats steps.
        self._run.define_metric("*", step_metric="step")

    def write(self, step: int, stage: str, values: Mapping[str, float], timing: Mapping[str, float]) -> None:
        tagged = {f"{stage}/{name}": value for name, value in values.items()}
        self._run.log({"step": step} | tagged | {f"timing/{name}": value for name, value in timing.items()})

    def close(self, finished: bool) -> None:
        if self._run is not None:
            self._run.finish(exit_code=0 if finished else 1)
            self._run = None
