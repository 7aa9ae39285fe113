"""Packages that only some media need."""

from __future__ import annotations

import importlib
from types import ModuleType

from mllm_jax.errors import DataError


def media_package(name: str, purpose: str) -> ModuleType:
    """Imports a package of the extra `media`.

    Args:
        name: of the module, which is also the package's.
        purpose: what needs it, for the message.

    Raises:
        DataError: it is not installed, or lacks its native library.
    """
    try:
        return importlib.import_module(name)
    except (ImportError, OSError) as error:  # soundfile raises OSError without libsndfile
        raise DataError(
            f"{purpose} without the package {name} ({type(error).__name__}: {error})",
            f"the package {name}",
            "pip install 'mllm-jax[media]'",
        ) from error
