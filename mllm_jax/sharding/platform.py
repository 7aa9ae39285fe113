"""The choice of jax's platform before jax searches: its search for a TPU that is missing prints warnings."""

from __future__ import annotations

import os
import pkgutil
import subprocess
import sys
from collections.abc import Iterable, MutableMapping
from functools import cache
from importlib.metadata import entry_points
from importlib.util import find_spec
from pathlib import Path

DEVICES = (
    *("accel*", "vfio/[0-9]*", "vfio/devices"),  # TPU
    *("nvidia[0-9]*", "nvidiactl", "nvidia-caps", "dxg"),  # NVIDIA, also under WSL
    "kfd",  # AMD
)
TPU_VARIABLES = ("TPU_", "MEGASCALE_", "COLAB_TPU", "JAX_FORCE_TPU_INIT")  # prefixes of variables for TPUs
# Variables that do not describe the machine; jax itself sets the first if it finds no TPU.
NO_TPU = ("TPU_SKIP_MDS_QUERY", "TPU_ML_PLATFORM", "TPU_LIBRARY_PATH", "TPU_MIN_LOG_LEVEL", "TPU_STDERR_LOG_LEVEL")
GPU_PLUGINS = ("xla_cuda", "xla_rocm")


def choose_platform(environ: MutableMapping[str, str] = os.environ, devices: Path = Path("/dev")) -> str | None:
    """Makes jax use the CPU on a machine without an accelerator; call it before any device is used.

    With libtpu installed, jax would otherwise search for a TPU first and print warnings. JAX_PLATFORMS, or a platform
    that the caller set in jax's config, takes precedence.

    Returns:
        "cpu", or None where the choice is left to jax.
    """
    chosen = "jax" in sys.modules and sys.modules["jax"].config.jax_platforms
    if chosen or "JAX_PLATFORMS" in environ or may_have_accelerator(environ, devices, _plugins()):
        return None
    environ["JAX_PLATFORMS"] = "cpu"
    if "jax" in sys.modules:  # it has read the environment already
        sys.modules["jax"].config.update("jax_platforms", "cpu")
    return "cpu"


def quiet_loader(environ: MutableMapping[str, str] = os.environ) -> None:
    """Hides the errors that XLA's C++ code logs on a CPU; call it before jax is imported.

    XLA chooses tuning features for a CPU and, when it loads a kept program, logs a line of thousands of characters for
    each that the CPU does not name itself. What really fails is raised. TF_CPP_MIN_LOG_LEVEL takes precedence.
    """
    if environ.get("JAX_PLATFORMS") == "cpu":
        environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")


def may_have_accelerator(environ: MutableMapping[str, str], devices: Path, plugins: Iterable[str]) -> bool:
    """Returns whether there is a sign of an accelerator: a device file, a TPU's variable, or a plugin of jax.

    Args:
        devices: the folder of device files.
        plugins: the names of jax's plugins; those for GPUs count only together with a device file.
    """
    return (
        any(next(devices.glob(pattern), None) for pattern in DEVICES)
        or any(name.startswith(TPU_VARIABLES) and not name.startswith(NO_TPU) for name in environ)
        or any(not name.startswith(GPU_PLUGINS) for name in plugins)
    )


def _plugins() -> set[str]:
    """Returns the installed plugins of jax, found as jax finds them; libtpu is not one of them."""
    package = find_spec("jax_plugins")
    folders = package.submodule_search_locations if package else None
    return {module.name for module in pkgutil.iter_modules(folders or [])} | {
        point.name for point in entry_points(group="jax_plugins")
    }


# XLA reads its flags when compile options are first created. No device is started, so this takes 0.3 s.
_READS_FLAGS = "from jaxlib.xla_client import CompileOptions; CompileOptions()"


@cache
def has_flag(flag: str) -> bool:
    """Returns whether the installed jaxlib accepts a flag, written as in XLA_FLAGS; asks a child process."""
    command = [sys.executable, "-P", "-c", _READS_FLAGS]  # -P: ignore modules in the working directory
    child = subprocess.run(
        command, env={**os.environ, "XLA_FLAGS": flag}, capture_output=True, stdin=subprocess.DEVNULL
    )
    return child.returncode == 0
