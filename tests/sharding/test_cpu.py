"""The flag that the library sets for CPU devices before XLA starts, and the error if that is too late."""

from __future__ import annotations

import os
import subprocess
import sys
import warnings
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from mllm_jax.errors import ConfigError
from mllm_jax.sharding import cpu
from mllm_jax.sharding.cpu import FLAG, check_sum, prepare_cpu, warn_of_wrong_sums
from mllm_jax.sharding.mesh import MeshConfig, make_mesh
from mllm_jax.sharding.platform import has_flag

ROOT = Path(__file__).parents[2]
# A sum in bfloat16 over some of the mesh's axes, in a process with the caller's environment.
SUM = """
import jax, jax.numpy as jnp, sys
if "late" in sys.argv:
    jax.devices()
from mllm_jax.sharding.mesh import MeshConfig, make_mesh
from mllm_jax.sharding.fsdp import scatter_sum
from mllm_jax.sharding.logical import use_mesh
mesh, spec = make_mesh(MeshConfig(data=1, fsdp=2)), jax.sharding.PartitionSpec
def local(x):
    if "unchecked" in sys.argv:
        return jax.lax.psum_scatter(x, "fsdp", scatter_dimension=0, tiled=True)
    return scatter_sum(x, ("fsdp",), 0)
add = jax.shard_map(local, mesh=mesh, in_specs=spec(), out_specs=spec("fsdp"), axis_names={"fsdp"}, check_vma=False)
with use_mesh(mesh):
    print("sum", jax.jit(add)(jnp.ones((2, 4), jnp.bfloat16)).astype(float).sum())
"""


def run(code: str, *arguments: str, flags: str = "--xla_force_host_platform_device_count=2"):
    environment = os.environ | {"XLA_FLAGS": flags, "PYTHONPATH": str(ROOT)}
    return subprocess.run(
        [sys.executable, "-c", code, *arguments], env=environment, capture_output=True, text=True, timeout=120
    )


@pytest.fixture
def flags(monkeypatch):
    """Returns a function that sets XLA_FLAGS, calls prepare_cpu and returns the new XLA_FLAGS."""

    def prepared(before: str | None) -> str | None:
        monkeypatch.setenv("XLA_FLAGS", before or "")
        if before is None:
            monkeypatch.delenv("XLA_FLAGS")
        prepare_cpu()
        return os.environ.get("XLA_FLAGS")

    return prepared


def test_a_flag_is_asked_of_a_child_process():
    assert has_flag("--xla_force_host_platform_device_count=3")
    assert not has_flag("--xla_no_such_flag=false"), "in this process it would have been the end"


def test_the_flag_joins_those_of_the_user(flags):
    assert flags(None) == flags("") == FLAG
    assert flags("--xla_dump_to=here --xla_disable_hlo_passes=cse,dce") == (
        f"--xla_dump_to=here --xla_disable_hlo_passes=cse,dce {FLAG}"
    )
    for given in (FLAG, "--xla_disable_hlo_passes=cse,all-reduce-promotion", "a_file_of_flags"):
        assert flags(given) == given


def test_xla_adds_the_passes_of_both_flags():
    code = "from jaxlib.xla_client import CompileOptions; print(CompileOptions().SerializeAsString())"
    found = run(code, flags=f"--xla_disable_hlo_passes=cse,dce {FLAG}").stdout
    assert "cse" in found and "dce" in found and cpu.PASS in found


@pytest.mark.parametrize("platforms", [None, "", "cuda,cpu", "tpu"])
def test_the_flag_is_for_the_cpu_alone(platforms, flags):
    before = jax.config.jax_platforms
    jax.config.update("jax_platforms", platforms)
    try:
        assert flags("--xla_dump_to=here") == "--xla_dump_to=here"
    finally:
        jax.config.update("jax_platforms", before)


def test_a_mesh_that_is_made_first_lets_xla_sum_in_bfloat16():
    done = run(SUM)
    assert done.returncode == 0 and "sum 16.0" in done.stdout, done.stderr


def test_a_sum_that_would_end_the_process_is_refused_in_words():
    late = run(SUM, "late")
    assert late.returncode == 1 and "ConfigError: bfloat16 with `fsdp` or `context` on CPU devices" in late.stderr
    assert FLAG in late.stderr
    ended = run(SUM, "late", "unchecked")
    assert ended.returncode < 0, "XLA compiles it: flag and refusal can go"


def test_only_bfloat16_on_cpu_devices_is_refused(monkeypatch):
    mesh = make_mesh(MeshConfig())
    check_sum(jnp.bfloat16, mesh)  # the suite's XLA has the flag
    monkeypatch.setattr(cpu, "_pass_is_disabled", lambda: False)
    check_sum(jnp.float32, mesh)
    check_sum(jnp.bfloat16, mesh.abstract_mesh)
    with pytest.raises(ConfigError, match="or compute in float32"):
        check_sum(jnp.bfloat16, mesh)


@pytest.mark.parametrize("version, wrong", [("0.10.1", False), ("0.10.2", True), ("0.12.0.1", False)])
def test_a_jaxlib_that_computes_wrongly_is_warned_of_once(version, wrong, monkeypatch):
    monkeypatch.setattr("jaxlib.version.__version__", version)
    warn_of_wrong_sums.cache_clear()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        make_mesh(MeshConfig())
        make_mesh(MeshConfig())
    warn_of_wrong_sums.cache_clear()
    assert [str(one.message)[:14] for one in caught] == ["jaxlib 0.10.2 "] * wrong
    assert all("pip install" in str(one.message) and one.category is UserWarning for one in caught)


def test_devices_that_are_given_set_no_flag(monkeypatch):
    """Checks devices of a TPU topology, for which the planner compiles in a process whose platform is the CPU."""
    monkeypatch.setenv("XLA_FLAGS", "")
    make_mesh(MeshConfig(), jax.devices())
    assert os.environ["XLA_FLAGS"] == ""
    make_mesh(MeshConfig())
    assert os.environ["XLA_FLAGS"] == FLAG
