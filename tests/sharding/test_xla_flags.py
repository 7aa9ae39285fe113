"""XLA's flags: asked of a child process, and set for CPU devices alone."""

from __future__ import annotations

from mllm_jax.sharding.xla_flags import has_flag


def test_a_flag_is_asked_of_a_child_process():
    assert has_flag("--xla_force_host_platform_device_count=3")
    assert not has_flag("--xla_no_such_flag=false"), "in this process it would have been the end"
