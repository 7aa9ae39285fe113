"""A user's own modules that a config names: their folders are remembered, so that its runs find them again.

The folders are kept in the user's cache and never in a run: a run folder from elsewhere names modules, but never
decides where code is read from.
"""

from __future__ import annotations

import importlib
import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

from mllm_jax.errors import ConfigError
from mllm_jax.files import read_json, write_atomic

PACKAGE = __name__.partition(".")[0]


def remember(description: Any) -> None:
    """Stores the folders of modules outside this package whose classes are in a described config.

    If the cache cannot be written, nothing is stored, and Python's own search finds the modules.
    """
    names = {name for name in modules_of(description) if name != PACKAGE}
    files = {name: getattr(sys.modules.get(name), "__file__", None) for name in names}
    folders = {name: _folder(Path(file)) for name, file in files.items() if file}
    if not folders:
        return
    try:
        known = _known()
        if known | folders != known:
            path = _file()
            path.parent.mkdir(parents=True, exist_ok=True)
            write_atomic(path, json.dumps(known | folders, indent=1) + "\n")
    except (OSError, RuntimeError):  # RuntimeError: a user without a home folder
        return


def find(module: str, kind: str) -> ModuleType:
    """Imports a module that a stored config names: by Python's search, else from its remembered folder.

    Args:
        kind: the class that it should contain, for the message.

    Raises:
        ConfigError: the module is not found.
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        top = module.partition(".")[0]
        if error.name not in (module, top):
            raise
        folder = _known().get(top)
        if folder is not None and Path(folder).is_dir() and folder not in sys.path:
            sys.path.append(folder)
            return find(module, kind)
        raise ConfigError(
            f"a stored config of class {kind!r}, of the module {module!r}, which is not found",
            f"the file {top}.py, or the package, that was beside the config",
            "put its folder on PYTHONPATH" + (f"; it was in {folder}" if folder else ""),
        ) from error


def modules_of(description: Any) -> Iterator[str]:
    """Yields the top-level modules of the classes and functions in a described config."""
    if isinstance(description, dict):
        if isinstance(kind := description.get("class", description.get("function")), str):
            yield kind.partition(":")[0].partition(".")[0]
        for value in description.values():
            yield from modules_of(value)
    elif isinstance(description, (list, tuple)):
        for value in description:
            yield from modules_of(value)


def _folder(file: Path) -> str:
    """Returns the folder that must be on the path for a module, or for the package of an __init__.py."""
    file = file.resolve()
    return str(file.parent.parent if file.name == "__init__.py" else file.parent)


def _file() -> Path:
    cache = os.environ.get("XDG_CACHE_HOME")
    return (Path(cache) if cache else Path.home() / ".cache") / PACKAGE / "modules.json"


def _known() -> dict[str, str]:
    try:
        return {name: folder for name, folder in read_json(_file(), ConfigError).items() if isinstance(folder, str)}
    except (OSError, RuntimeError, ConfigError):
        return {}
