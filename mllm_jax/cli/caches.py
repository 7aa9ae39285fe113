"""Caches between commands, if the home folder can be written; nothing depends on them."""

from __future__ import annotations

import os
import sys
from pathlib import Path

from mllm_jax.errors import ConfigError


def keep_compiled_programs() -> None:
    """Keeps compiled programs for the next start; warns once if that is impossible."""
    from mllm_jax.training.operations.compilation import keep_compiled

    try:
        folder = keep_compiled()
        problem = None if folder is None or os.access(folder, os.W_OK) else f"{folder} cannot be written"
    except (ConfigError, RuntimeError) as error:  # RuntimeError: a user without a home folder
        problem = getattr(error, "given", str(error))
    if problem is not None:
        import jax

        jax.config.update("jax_compilation_cache_dir", None)
        print(
            f"warning: compiled programs are not kept: {problem}; XDG_CACHE_HOME names another folder", file=sys.stderr
        )


def lengths_folder() -> Path | None:
    """Returns the folder for measured lengths; None if it cannot be written."""
    try:
        data = os.environ.get("MLLM_DATA_DIR") or Path.home() / "tensorflow_datasets"
        folder = Path(data) / "mllm_jax_lengths"
        folder.mkdir(parents=True, exist_ok=True)
    except (OSError, RuntimeError):
        return None
    return folder if os.access(folder, os.W_OK) else None
