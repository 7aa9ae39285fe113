"""Compiled programs, kept on disk so that a restart does not compile them again."""

from __future__ import annotations

import hashlib
import os
import platform
from pathlib import Path

from mllm_jax.errors import ConfigError


def keep_compiled(folder: Path | None = None) -> Path | None:
    """Lets JAX keep compiled programs in `folder`, by default one of the user's cache for this kind of machine.

    JAX_COMPILATION_CACHE_DIR takes precedence if it is set.

    Returns:
        the folder, or None if the environment names one.

    Raises:
        ConfigError: the folder cannot be made.
    """
    if os.environ.get("JAX_COMPILATION_CACHE_DIR"):
        return None
    folder = folder or user_cache() / "compiled" / machine()
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(
            f"the cache of compiled programs in {folder}: {error.strerror or error}",
            "a folder that can be made",
            "set XDG_CACHE_HOME or JAX_COMPILATION_CACHE_DIR to another one, or give --no-compile-cache",
        ) from error
    import jax

    jax.config.update("jax_compilation_cache_dir", str(folder))
    return folder


def user_cache() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "mllm_jax"


def machine() -> str:
    """Returns a name that two machines share only if programs compiled for one CPU run on the other."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        facts = sorted({line for line in lines if line.startswith(("model name", "flags", "Features", "CPU part"))})
    except OSError:
        facts = [platform.processor()]
    return hashlib.sha256("\n".join([platform.machine(), *facts]).encode()).hexdigest()[:12]
