"""Reads a config file, whose `config()` returns an Experiment; reports errors with line numbers."""

from __future__ import annotations

import dataclasses
import difflib
import re
import runpy
import sys
import traceback
from pathlib import Path

from mllm_jax.errors import ConfigError, MllmError
from mllm_jax.training.config import Experiment


def load_config(path: Path) -> Experiment:
    """Returns the `Experiment` that `config()` of a Python file builds.

    Raises:
        ConfigError: no such file, no `config()` in it, or a field that does not exist.
    """
    if not path.is_file():
        raise ConfigError(f"no config at {path}", "a Python file with `def config() -> Experiment`", "check the path")
    if (beside := str(path.resolve().parent)) not in sys.path:
        sys.path.insert(0, beside)  # as Python does for a script: a config imports the files beside it
    try:
        make = runpy.run_path(str(path)).get("config")
        if not callable(make):
            raise ConfigError(f"{path} without config()", "`def config() -> Experiment` in it", "add the function")
        experiment = make()
    except MllmError:
        raise
    except Exception as error:
        raise _config_error(path, error) from error
    if not isinstance(experiment, Experiment):
        raise ConfigError(f"{path}: config() returns {type(experiment).__name__}", "an Experiment", "correct the file")
    return experiment


def _config_error(path: Path, error: Exception) -> ConfigError:
    """Describes an error in a config, with its line; for an unknown field also the nearest one that exists."""
    frames = list(traceback.walk_tb(error.__traceback__))
    lines = [line for frame, line in frames if frame.f_code.co_filename == str(path)]
    where = f"{path}, line {lines[-1]}" if lines else str(path)
    unknown = re.match(r"(\S+)\.__init__\(\) got an unexpected keyword argument '(\w+)'", str(error))
    if unknown and (fields := _fields(unknown[1], frames)):
        name, key = unknown.groups()
        near = difflib.get_close_matches(key, fields, n=1)
        todo = f"did you mean {near[0]!r}?" if near else "remove it"
        return ConfigError(f"{where}: {name} has no field {key!r}", f"some of {', '.join(fields)}", todo)
    given = f"{where}: {type(error).__name__}: {error}"
    return ConfigError(given, "a config() that builds an Experiment", "correct the file")


def _fields(name: str, frames: list) -> list[str]:
    """Returns the fields of the dataclass of this name in a config or in this package; none without such a class."""
    scopes = [frame.f_globals for frame, _ in frames]
    scopes += [vars(module) for key, module in list(sys.modules.items()) if key.startswith("mllm_jax.")]
    kind = next((scope[name] for scope in scopes if name in scope), None)
    return [field.name for field in dataclasses.fields(kind) if field.init] if dataclasses.is_dataclass(kind) else []
