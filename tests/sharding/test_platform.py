"""The CPU is chosen only if there is no sign of an accelerator, and then without warnings."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import jax
import pytest

from mllm_jax.sharding.platform import choose_platform, may_have_accelerator, quiet_loader

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("device", ["accel0", "vfio/0", "vfio/devices/vfio0", "nvidia0", "nvidiactl", "dxg", "kfd"])
def test_a_device_file_speaks_for_an_accelerator(tmp_path, device):
    (tmp_path / "vfio").mkdir()
    for name in ("null", "vfio/vfio", "nvram", "dri"):  # files that machines without one have too
        (tmp_path / name).touch()
    assert not may_have_accelerator({}, tmp_path, ())
    (tmp_path / device).parent.mkdir(exist_ok=True)
    (tmp_path / device).touch()
    assert may_have_accelerator({}, tmp_path, ())


def test_variables_and_plugins_speak_for_one(tmp_path):
    # jax itself sets the first if it finds no TPU.
    assert not may_have_accelerator({"TPU_SKIP_MDS_QUERY": "1", "TPU_LIBRARY_PATH": "x", "HOME": "/"}, tmp_path, ())
    for name in ("TPU_WORKER_ID", "TPU_ACCELERATOR_TYPE", "TPU_NAME", "MEGASCALE_NUM_SLICES", "JAX_FORCE_TPU_INIT"):
        assert may_have_accelerator({name: "0"}, tmp_path, ())
    assert not may_have_accelerator({}, tmp_path, ("xla_cuda12", "xla_rocm7"))
    assert may_have_accelerator({}, tmp_path, ("xla_cuda12", "metal"))


def test_the_last_word_is_the_users(tmp_path, monkeypatch):
    monkeypatch.setattr("mllm_jax.sharding.platform._plugins", set)
    before = jax.config.jax_platforms
    assert before == "cpu", "tests/conftest.py sets it"
    assert choose_platform({}, tmp_path) is None, "jax's config names one"
    try:
        jax.config.update("jax_platforms", None)
        for given in ("tpu", ""):
            environ = {"JAX_PLATFORMS": given}
            assert choose_platform(environ, tmp_path) is None and environ == {"JAX_PLATFORMS": given}
        (tmp_path / "accel0").touch()
        assert choose_platform(environ := {}, tmp_path) is None and environ == {} and not jax.config.jax_platforms
        (tmp_path / "accel0").unlink()
        assert choose_platform(environ, tmp_path) == "cpu" == environ["JAX_PLATFORMS"] == jax.config.jax_platforms
    finally:
        jax.config.update("jax_platforms", before)


@pytest.mark.skipif(may_have_accelerator(os.environ, Path("/dev"), ()), reason="a machine with an accelerator")
@pytest.mark.parametrize("first", ["mllm_jax", "jax"])
def test_a_cpu_is_found_in_silence_although_libtpu_is_installed(first):
    code = f"""
import {first}
from mllm_jax.sharding.platform import choose_platform
choose_platform()
import jax
print(jax.devices()[0].platform)
"""
    environment = {name: x for name, x in os.environ.items() if name != "JAX_PLATFORMS"} | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "cpu\n", "")


@pytest.mark.parametrize(
    "given,level",
    [
        (dict(JAX_PLATFORMS="cpu"), "3"),
        (dict(JAX_PLATFORMS="cpu", TF_CPP_MIN_LOG_LEVEL="0"), "0"),
        (dict(JAX_PLATFORMS="cuda"), None),
        ({}, None),
    ],
)
def test_the_log_of_xla_on_a_cpu(given, level):
    environ = dict(given)
    quiet_loader(environ)
    assert environ.get("TF_CPP_MIN_LOG_LEVEL") == level


KEPT = """
import jax, jax.numpy as jnp
for name in ("min_compile_time_secs", "min_entry_size_bytes"):
    jax.config.update(f"jax_persistent_cache_{name}", 0)
print(jax.jit(lambda x: jax.lax.fori_loop(0, 3, lambda i, y: jnp.sin(y @ y) + i, x))(jnp.ones((64, 64))).sum())
"""


def test_loading_a_kept_program_prints_nothing(tmp_path):
    """Checks it where XLA chooses features that the CPU does not name; elsewhere nothing would be printed anyway."""
    environ = {name: value for name, value in os.environ.items() if name != "TF_CPP_MIN_LOG_LEVEL"}
    environ |= dict(JAX_PLATFORMS="cpu", JAX_COMPILATION_CACHE_DIR=str(tmp_path))
    quiet_loader(environ)
    for _ in range(2):
        found = subprocess.run([sys.executable, "-c", KEPT], env=environ, capture_output=True, text=True, check=True)
        assert not found.stderr and list(tmp_path.iterdir())
