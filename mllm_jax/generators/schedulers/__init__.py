"""Noise schedules and the steps of diffusion samplers: one scheduler a file, under the names of `NAMES`.

`from_folder` opens a scheduler's folder, `by_name` takes another scheduler with the same options. protocol.py says what
a scheduler is and has the sampling loop.
"""

from __future__ import annotations

import os.path
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mllm_jax.checkpoints.components import MODEL_INDEX
from mllm_jax.errors import CheckpointError, ConfigError
from mllm_jax.files import read_json
from mllm_jax.generators.schedulers.config import FILE, SchedulerConfig
from mllm_jax.generators.schedulers.ddim import DDIM
from mllm_jax.generators.schedulers.ddpm import DDPM
from mllm_jax.generators.schedulers.dpm_solver import DPMSolver
from mllm_jax.generators.schedulers.euler import Euler, EulerAncestral
from mllm_jax.generators.schedulers.flow_euler import FlowEuler
from mllm_jax.generators.schedulers.pndm import PNDM
from mllm_jax.generators.schedulers.protocol import Scheduler, State

_BYTES = 16 << 20
NAMES: dict[str, type[SchedulerConfig]] = {
    "ddpm": DDPM,
    "ddim": DDIM,
    "pndm": PNDM,
    "euler": Euler,
    "euler_ancestral": EulerAncestral,
    "dpm++": DPMSolver,
    "flow": FlowEuler,
}
_CLASSES = {each.class_name: each for each in NAMES.values()}
_KNOWN = frozenset().union(*(each.option_names() for each in NAMES.values()))

__all__ = ["NAMES", "Scheduler", "State", "by_name", "from_folder"]


def from_folder(folder: str | Path, name: str | None = None) -> Scheduler:
    """Reads the scheduler of a folder: a scheduler's own, or a pipeline's with the subfolder `scheduler`.

    Args:
        name: another scheduler, one of `NAMES`, with the folder's options; see `by_name`.

    Raises:
        CheckpointError: no readable scheduler_config.json.
        ConfigError: a class or an option without support, or a value of another type.
    """
    folder = Path(folder)
    places = folder / FILE, folder / "scheduler" / FILE
    path = next((place for place in places if os.path.exists(place)), None)
    if path is None:
        raise CheckpointError(
            f"{folder} without {FILE}", f"it in the folder or in {folder / 'scheduler'}", "fetch the scheduler's folder"
        )
    values = _read(path)
    if name is not None:
        return by_name(name, values)
    if path.parent != folder:
        values = {**values, **_indexed_class(folder)}
    return _class_of(values, str(path)).from_values(values, _KNOWN)


def by_name(name: str, values: Mapping[str, Any] | Scheduler | None = None) -> Scheduler:
    """Makes a scheduler by its name, one of `NAMES`, as diffusers' `EulerDiscreteScheduler.from_config(values)`.

    Args:
        values: options as a scheduler_config.json has them, of any class, or the scheduler that they are taken from.
            Options that were not set there have the defaults of the new scheduler. Those of the old one alone have no
            effect and are kept for saving.

    Raises:
        ConfigError: an unknown name, or options of flow matching for a scheduler of diffusion, or the inverse.
    """
    if name not in NAMES:
        raise ConfigError(f"the scheduler {name!r}", f"one of {', '.join(NAMES)}", "choose one of them")
    if isinstance(values, SchedulerConfig):
        values = values.values()
    values = dict(values or {})
    made = NAMES[name]
    old = values.get("_class_name", made.class_name)
    if str(old).startswith("FlowMatch") != (made is FlowEuler):
        raise ConfigError(
            f"the scheduler {name!r} for the options of {old!r:.100}",
            "a scheduler of the same kind: flow matching, or diffusion",
            "choose another scheduler; the model was trained for one kind",
        )
    return made.from_values({**values, "_class_name": made.class_name}, _KNOWN)


def _read(path: Path) -> dict[str, Any]:
    try:
        return read_json(path, CheckpointError, limit=_BYTES)
    except OSError as error:
        raise CheckpointError(f"{path}: {error}", "a readable file", "fetch the file again") from error


def _indexed_class(folder: Path) -> dict[str, str]:
    """Returns the scheduler's class in a pipeline's model_index.json; diffusers prefers it too."""
    if not os.path.isfile(folder / MODEL_INDEX):
        return {}
    entry = _read(folder / MODEL_INDEX).get("scheduler")
    listed = isinstance(entry, list) and len(entry) == 2 and isinstance(entry[1], str)
    return {"_class_name": entry[1]} if listed else {}


def _class_of(values: Mapping[str, Any], where: str) -> type[SchedulerConfig]:
    """Returns the class of a scheduler_config.json. Raises ConfigError if there is none, or it is not here."""
    name = values.get("_class_name")
    if not isinstance(name, str) or name not in _CLASSES:
        raise ConfigError(
            f"{where} of the scheduler {name!r:.100}",
            f"one of {', '.join(_CLASSES)}",
            "choose another scheduler by name, or write its class as _class_name",
        )
    return _CLASSES[name]
