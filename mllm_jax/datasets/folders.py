"""Folders of data: of an installed package, or one that the user names."""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path

from mllm_jax.errors import DataError


def package_folder(package: str, *, expected: str, todo: str) -> Path:
    """Returns the folder of an installed package without importing it.

    Args:
        expected, todo: of the error.

    Raises:
        DataError: the package is not installed.
    """
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise DataError(f"the package `{package}`, which is not installed", expected, todo)
    return Path(spec.submodule_search_locations[0])


def named_folder(folder: str) -> Path:
    """Returns a folder whose name is relative to the environment variable MLLM_DATA_DIR, else the working folder."""
    return Path(os.environ.get("MLLM_DATA_DIR") or ".") / folder
