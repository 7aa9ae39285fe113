"""The processes of a run: given by flags or the environment, or detected from the cluster."""

from __future__ import annotations

import os
import re
import sys
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from mllm_jax.errors import ConfigError, TrainingError

COORDINATOR, PROCESSES, PROCESS = "JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID"
LOST_EXIT = 3  # another process of the run is gone
CONNECT_SECONDS = 300


@dataclass(frozen=True)
class Hosts:
    """The processes that train together, one a host. Default: as in the environment, or one process.

    Attributes:
        coordinator: host:port of the first process, to which all connect.
        num_processes: their number; 1 lets a host of a TPU slice or of a SLURM step train alone.
        process_id: index of this process, from 0.
        heartbeat_seconds: a process without a sign of life for this long counts as dead, and the others stop.
    """

    coordinator: str | None = None
    num_processes: int | None = None
    process_id: int | None = None
    heartbeat_seconds: int = 100

    def __post_init__(self):
        given = (self.coordinator, self.num_processes, self.process_id)
        if self.num_processes == 1 and self.coordinator is None:
            return
        if any(x is not None for x in given) and None in given:
            raise ConfigError(
                f"coordinator {self.coordinator}, num_processes {self.num_processes}, process_id {self.process_id}",
                "all three, or none if SLURM, Open MPI or a TPU slice starts the processes",
                f"give --hosts.coordinator, --hosts.num-processes and --hosts.process-id, or {COORDINATOR}, "
                f"{PROCESSES} and {PROCESS} in the environment",
            )
        if self.num_processes is not None and not 0 <= self.process_id < self.num_processes:
            raise ConfigError(
                f"process {self.process_id} of {self.num_processes}", "numbers from 0 on", "change --hosts.process-id"
            )


def resolve(hosts: Hosts, environ: Mapping[str, str] = os.environ) -> Hosts | str | None:
    """Returns the Hosts of flags or environment, the name of a cluster that jax detects by itself, or None.

    Raises:
        ConfigError: the environment has a coordinator without the other two values, or values that are not numbers.
    """
    if hosts.num_processes is not None:
        return hosts if hosts.coordinator is not None else None
    if COORDINATOR in environ and (PROCESSES in environ or PROCESS in environ):
        count, number = environ.get(PROCESSES), environ.get(PROCESS)
        if not all(text is None or text.isdecimal() for text in (count, number)):
            raise ConfigError(
                f"{PROCESSES}={count}, {PROCESS}={number} in the environment", "two numbers", "correct them"
            )
        return Hosts(
            environ[COORDINATOR], *(None if x is None else int(x) for x in (count, number)), hosts.heartbeat_seconds
        )
    slurm = ("SLURM_JOB_ID", "SLURM_STEP_NODELIST", "SLURM_PROCID", "SLURM_LOCALID")
    if all(name in environ for name in slurm) and int(environ.get("SLURM_NTASKS", "1")) > 1:
        return "slurm"
    if int(environ.get("OMPI_COMM_WORLD_SIZE", "1")) > 1:
        return "ompi"
    if _on_tpu_host(environ):
        slices = int(environ.get("MEGASCALE_NUM_SLICES") or 1)
        workers = environ.get("TPU_PROCESS_ADDRESSES") or environ.get("TPU_WORKER_HOSTNAMES")
        if workers is None and "TPU_SKIP_MDS_QUERY" not in environ:
            return "gcetpu"  # jax asks the metadata server, for a slice of one host too
        if slices > 1 or (workers and "," in workers):
            return "gketpu"
    return None


def _on_tpu_host(environ: Mapping[str, str]) -> bool:
    """Returns whether the host has TPU chips whose use is not switched off; libtpu alone does not count."""
    if environ.get("JAX_PLATFORMS", "tpu").split(",")[0] != "tpu":
        return False
    return any(Path(device).exists() for device in ("/dev/accel0", "/dev/vfio/0"))


def join(hosts: Hosts, environ: Mapping[str, str] = os.environ) -> bool:
    """Connects this process with the others of its run, before any use of a device; returns False if it is alone.

    On a CPU, collectives between processes use gloo; its lines on standard output are not printed.

    Raises:
        TrainingError: the others did not connect, or the coordinator could not be reached.
    """
    found = resolve(hosts, environ)
    if found is None:
        return False
    import jax

    _keep_standard_output()
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    common = dict(heartbeat_timeout_seconds=hosts.heartbeat_seconds, initialization_timeout=CONNECT_SECONDS)
    if isinstance(found, Hosts):
        address = dict(
            coordinator_address=found.coordinator, num_processes=found.num_processes, process_id=found.process_id
        )
        where = f"process {found.process_id} of {found.num_processes} at {found.coordinator}"
        common |= address | {"cluster_detection_method": "deactivate"}
    else:
        where = f"processes as {found} reports them"
        common |= {"cluster_detection_method": found}
    try:
        jax.distributed.initialize(**common)
    except (RuntimeError, ValueError, OSError, AttributeError) as error:
        raise TrainingError(
            f"{where}: {str(error).splitlines()[0] if str(error) else type(error).__name__}",
            f"all processes within {CONNECT_SECONDS} s, at a coordinator that every host can reach",
            "start them all, check the address and the firewall; --hosts.num-processes 1 trains on this host alone",
        ) from error
    return True


def _keep_standard_output() -> None:
    """Reserves standard output for Python.

    Gloo writes "[Gloo] Rank 0 is connected to ..." into C++'s standard output for every new group of devices, at any
    time, and has no option for it. C++ writes errors to standard error, which stays as it is.
    """
    python = sys.stdout
    try:
        if python is not sys.__stdout__ or python.fileno() != 1:
            return  # a notebook or a test has taken it already
    except (AttributeError, OSError, ValueError):
        return  # there is none
    python.flush()
    kept = os.fdopen(os.dup(1), "w", encoding=python.encoding, errors=python.errors)
    kept.reconfigure(line_buffering=python.line_buffering, write_through=python.write_through)
    nothing = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nothing, 1)
    os.close(nothing)
    sys.stdout = sys.__stdout__ = kept


def leave() -> None:
    """Disconnects from the other processes, if there are any, after all have reached this point."""
    import jax

    if jax.distributed.is_initialized():
        jax.distributed.shutdown()


def end_together(work: Callable[[], int], refused: Callable[[Callable[[], int]], int]) -> int:
    """Runs the work of one of several processes; returns its exit code, 0, after all have finished.

    A failure exits the process here and at once: a normal exit would first wait for the other processes, which may be
    waiting for this one. They notice that it is gone.

    Args:
        refused: calls its argument and turns refusals into messages and exit codes.
    """

    def attempt() -> int:
        try:
            return work()
        except Exception as error:
            if (lost := lost_host(error)) is None:
                raise
            print(f"{type(lost).__name__}: {lost}", file=sys.stderr)
            return LOST_EXIT

    code = 1
    try:
        code = refused(attempt)
        if code == 0:
            leave()
    except BaseException:
        traceback.print_exc()
    finally:
        if code:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)
    return code


def lost_host(error: BaseException | None) -> TrainingError | None:
    """Returns the error to report if a dead or unreachable process caused this one; otherwise None."""
    import jax

    while error is not None and not (isinstance(error, jax.errors.JaxRuntimeError) or _has_status(error)):
        error = error.__cause__  # such as a checkpoint that failed because of it
    if error is None or jax.process_count() == 1:
        return None
    text = str(error)
    signs = ("gloo", "connection", "unavailable", "coordination", "heartbeat", "deadline", "barrier", "socket")
    if not any(sign in text.lower() for sign in signs):
        return None
    return TrainingError(
        f"process {jax.process_index()} of {jax.process_count()} lost another one: {text.splitlines()[0]:.300}",
        "all processes of the run alive; the output of the other one has the reason for its end",
        "start all of them again with the same command: the run continues from its last checkpoint",
    )


def _has_status(error: BaseException) -> bool:
    """Returns whether a ValueError is one of jax's that begin with a status, such as "UNKNOWN: Gloo all-reduce"."""
    return isinstance(error, ValueError) and re.match(r"[A-Z_]+: ", str(error)) is not None
