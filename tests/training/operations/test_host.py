"""The allocator keeps freed memory."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
import textwrap

import pytest

from mllm_jax.training.operations.host import enough_threads

PROBE = """
import resource, sys
import numpy as np
from mllm_jax.training.operations.host import LARGE, keep_freed_memory, return_large_memory

if sys.argv[1] != "return":
    assert keep_freed_memory()
if sys.argv[1] == "large":
    assert return_large_memory(LARGE) and not return_large_memory(LARGE - 1)
for _ in range(3):
    np.ones(1 << 23)  # 64 MB, allocated, written and freed
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(10):
    np.ones(1 << 23)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def faults(how: str) -> int:
    run = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(PROBE), how], capture_output=True, text=True, check=True
    )
    return int(run.stdout)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="the settings are those of glibc's malloc")
def test_freed_memory_is_not_asked_of_the_system_again():
    kept, returned = faults("keep"), faults("return")
    assert kept < 100 and returned > 10 * kept + 100, (kept, returned)
    assert faults("large") > 10 * kept + 100, "beside a large state, large blocks go back to the system"


@pytest.mark.parametrize("given,devices,wanted", [(None, 1, None), (None, 10_000, "40000"), ("7", 10_000, "7")])
def test_more_devices_than_cores_get_threads_to_wait_in(given, devices, wanted, monkeypatch):
    monkeypatch.delenv("NPROC")
    if given:
        monkeypatch.setenv("NPROC", given)
    enough_threads(devices)
    assert os.environ.get("NPROC") == wanted
