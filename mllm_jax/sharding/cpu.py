"""The XLA flag with which CPU devices compile a pod's programs, and a warning about a jaxlib that computes wrongly."""

from __future__ import annotations

import os
import sys
import warnings
from functools import cache

from mllm_jax.errors import ConfigError
from mllm_jax.sharding.platform import choose_platform, has_flag

# The pass turns sums in bfloat16 into sums in float32. It aborts the process at sums of a `shard_map` over some of the
# mesh's axes, as `fsdp` and `context` use. Without it the CPU sums in bfloat16.
PASS = "all-reduce-promotion"
FLAG = f"--xla_disable_hlo_passes={PASS}"
WRONG_JAXLIB = "0.10.2"  # jax#39103


def prepare_cpu() -> None:
    """Sets the flag with which XLA compiles sums in bfloat16 across CPU devices; call it before any device is used.

    The flag goes into XLA_FLAGS and affects the whole process, so it is set only if jax's platform is the CPU. The
    planner, which compiles for TPUs on a CPU, does not call this. Passes that the user disables stay disabled; flags
    that already name this pass stay unchanged. Warns once about a jaxlib that computes wrongly.
    """
    if not on_cpu():
        return
    warn_of_wrong_sums()
    flags = os.environ.get("XLA_FLAGS", "")
    in_a_file = flags and not flags.startswith("--")  # XLA then reads a file of this name
    if PASS not in flags and not in_a_file and has_flag(FLAG):
        os.environ["XLA_FLAGS"] = f"{flags} {FLAG}".strip()


def on_cpu() -> bool:
    """Returns whether jax's platform is the CPU; no device is touched."""
    choose_platform()
    platforms = sys.modules["jax"].config.jax_platforms if "jax" in sys.modules else os.environ.get("JAX_PLATFORMS")
    return platforms == "cpu"


@cache
def warn_of_wrong_sums() -> None:
    """Warns once if this jaxlib computes some float32 sums wrongly on CPUs."""
    from jaxlib.version import __version__

    if __version__ == WRONG_JAXLIB:
        warnings.warn(
            f"jaxlib {__version__} computes some float32 sums of more than 32,768 rows wrongly on CPUs, without an "
            "error (jax#39103). Install another: pip install 'jax!=0.10.2' 'jaxlib!=0.10.2'",
            stacklevel=3,
        )


def check_sum(dtype, mesh) -> None:
    """Raises an error for a sum across CPU devices that would make XLA abort the process; call it during tracing.

    Args:
        dtype: dtype of the summands.
        mesh: the devices; an abstract mesh has none and is not checked.

    Raises:
        ConfigError: a sum in bfloat16 in a process whose XLA started without the flag of `prepare_cpu`.
    """
    import jax

    cpu = not isinstance(mesh, jax.sharding.AbstractMesh) and mesh.devices.flat[0].platform == "cpu"
    if jax.numpy.dtype(dtype) == jax.numpy.bfloat16 and cpu and not _pass_is_disabled():
        raise ConfigError(
            "bfloat16 with `fsdp` or `context` on CPU devices, where XLA cannot compile the sums of the gradients",
            f"a process whose XLA started with {FLAG}",
            "make the mesh with mllm_jax.sharding.mesh.make_mesh before anything else uses a device; "
            f"or set XLA_FLAGS={FLAG}; or compute in float32",
        )


@cache
def _pass_is_disabled() -> bool:
    """Returns whether XLA, which reads its flags once, was started with the flag."""
    from jaxlib.xla_client import CompileOptions

    return PASS.encode() in CompileOptions().SerializeAsString()


def cores() -> int:
    """Returns the number of cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
