"""The platform that jax computes on, chosen before jax looks for one: a search for a TPU that is not there is loud."""

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
TPU_VARIABLES = ("TPU_", "MEGASCALE_", "COLAB_TPU", "JAX_FORCE_TPU_INIT")  # how what describes a TPU begins
# What says nothing of the machine; jax itself sets the first of them where it sees no TPU.
NO_TPU = ("TPU_SKIP_MDS_QUERY", "TPU_ML_PLATFORM", "TPU_LIBRARY_PATH", "TPU_MIN_LOG_LEVEL", "TPU_STDERR_LOG_LEVEL")
GPU_PLUGINS = ("xla_cuda", "xla_rocm")


def choose_platform(environ: MutableMapping[str, str] = os.environ, devices: Path = Path("/dev")) -> str | None:
    """Makes jax use the CPU on a machine without an accelerator; call it before a device is touched.

    With libtpu installed, jax would otherwise look for a TPU first and print what it misses. JAX_PLATFORMS, or a
    platform that the caller chose in jax's config, has the last word.

    Returns:
        "cpu", or None where the choice is left to jax.
    """
    chosen = "jax" in sys.modules and sys.modules["jax"].config.jax_platforms
    if chosen or "JAX_PLATFORMS" in environ or may_have_accelerator(environ, devices, _plugins()):
        return None
    environ["JAX_PLATFORMS"] = "cpu"
    if "jax" in sys.modules:  # which has read the environment already
        sys.modules["jax"].config.update("jax_platforms", "cpu")
    return "cpu"


def may_have_accelerator(environ: MutableMapping[str, str], devices: Path, plugins: Iterable[str]) -> bool:
    """Whether anything speaks for an accelerator: a device file, a variable that describes a TPU, a plugin of jax.

    Args:
        devices: where the device files lie.
        plugins: the names of jax's plugins; those for GPUs need a device file besides.
    """
    return (
        any(next(devices.glob(pattern), None) for pattern in DEVICES)
        or any(name.startswith(TPU_VARIABLES) and not name.startswith(NO_TPU) for name in environ)
        or any(not name.startswith(GPU_PLUGINS) for name in plugins)
    )


def _plugins() -> set[str]:
    """The plugins of jax that are installed, found as jax finds them; libtpu is none of them."""
    package = find_spec("jax_plugins")
    places = package.submodule_search_locations if package else None
    return {module.name for module in pkgutil.iter_modules(places or [])} | {
        point.name for point in entry_points(group="jax_plugins")
    }


# XLA reads its flags when options for a compilation are first made. No device is started, so this takes 0.3 s.
_READS_FLAGS = "from jaxlib.xla_client import CompileOptions; CompileOptions()"


@cache
def has_flag(flag: str) -> bool:
    """Asks a child process whether the installed jaxlib accepts a flag, given as XLA_FLAGS would have it."""
    command = [sys.executable, "-P", "-c", _READS_FLAGS]  # -P: no module of the working directory
    child = subprocess.run(
        command, env={**os.environ, "XLA_FLAGS": flag}, capture_output=True, stdin=subprocess.DEVNULL
    )
    return child.returncode == 0
