"""The processes of a run, as given by flags and environments."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import jax
import pytest

from mllm_jax.errors import CheckpointError, ConfigError
from mllm_jax.training.operations import distributed
from mllm_jax.training.operations.distributed import Hosts, join, resolve

TOLD = {"JAX_COORDINATOR_ADDRESS": "a:1", "JAX_NUM_PROCESSES": "4", "JAX_PROCESS_ID": "3"}
SLURM = {
    "SLURM_JOB_ID": "1",
    "SLURM_STEP_NODELIST": "node[1-2]",
    "SLURM_NTASKS": "2",
    "SLURM_PROCID": "0",
    "SLURM_LOCALID": "0",
}


@pytest.fixture
def tpu_host(monkeypatch):
    monkeypatch.setattr(distributed, "_on_tpu_host", lambda environ: True)


def test_only_python_writes_to_standard_output():
    """Checks that C++ lines, such as gloo's, are dropped, while Python's lines and all errors are printed."""
    code = """
import os, sys
from mllm_jax.training.operations.distributed import _keep_standard_output
print("before")
_keep_standard_output()
os.write(1, b"[Gloo] Rank 0 is connected to 1 peer ranks\\n")
os.write(2, b"a real error\\n")
print("after \u00e9")
"""
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=Path(__file__).parents[3], capture_output=True, encoding="utf-8", timeout=100
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "before\nafter \u00e9\n", "a real error\n")


def test_alone_where_nothing_says_otherwise():
    assert resolve(Hosts(), {}) is None
    assert join(Hosts(), {}) is False


def test_flags_come_before_the_environment():
    flags = Hosts("b:2", 2, 1)
    assert resolve(flags, TOLD) == flags
    assert resolve(Hosts(num_processes=1), TOLD | SLURM) is None


def test_the_environment_tells_coordinator_count_and_number():
    assert resolve(Hosts(heartbeat_seconds=7), TOLD) == Hosts("a:1", 4, 3, 7)


def test_slurm_and_open_mpi_are_seen_by_their_steps():
    assert resolve(Hosts(), SLURM) == "slurm"
    assert resolve(Hosts(), SLURM | {"SLURM_NTASKS": "1"}) is None
    assert resolve(Hosts(), {"SLURM_JOB_ID": "1", "SLURM_NTASKS": "8"}) is None, "a batch script, not a step"
    assert resolve(Hosts(), {"OMPI_COMM_WORLD_SIZE": "2"}) == "ompi"


def test_tpu_slices_are_seen_by_their_workers(tpu_host):
    assert resolve(Hosts(), {"TPU_WORKER_HOSTNAMES": "w0,w1"}) == "gketpu"
    assert resolve(Hosts(), {"TPU_WORKER_HOSTNAMES": "w0"}) is None
    assert resolve(Hosts(), {"TPU_WORKER_HOSTNAMES": "w0", "MEGASCALE_NUM_SLICES": "2"}) == "gketpu"
    assert resolve(Hosts(), {}) == "gcetpu"
    assert resolve(Hosts(), {"TPU_SKIP_MDS_QUERY": "1"}) is None


def test_a_machine_that_computes_on_its_cpu_is_no_tpu_host():
    assert not distributed._on_tpu_host({"JAX_PLATFORMS": "cpu"})


@pytest.mark.parametrize(
    "make",
    [
        lambda: Hosts("a:1"),
        lambda: Hosts("a:1", 2),
        lambda: Hosts(num_processes=2),
        lambda: Hosts("a:1", 2, 2),
        lambda: resolve(Hosts(), TOLD | {"JAX_PROCESS_ID": "one"}),
        lambda: resolve(Hosts(), {k: v for k, v in TOLD.items() if k != "JAX_PROCESS_ID"}),
    ],
)
def test_half_told_is_refused(make):
    with pytest.raises(ConfigError, match="to do"):
        make()


def test_an_error_of_a_lost_process_is_told_as_one(monkeypatch):
    error = CheckpointError("writing failed", "a folder", "free some space")
    error.__cause__ = jax.errors.JaxRuntimeError("UNAVAILABLE: Socket closed\nmore")
    assert distributed.lost_host(error) is None, "one process loses no other"
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    assert "process 0 of 2 lost another one: UNAVAILABLE: Socket closed" in str(distributed.lost_host(error))
    gloo = ValueError("UNKNOWN: Gloo all-reduce failed: Read error: Connection reset by peer")
    assert "lost another one: UNKNOWN: Gloo" in str(distributed.lost_host(gloo))
    for other in (
        ValueError("no connection"),
        CheckpointError("a", "b", "c"),
        jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: out of memory"),
    ):
        assert distributed.lost_host(other) is None
