"""The setting of every test: eight CPU devices, fixed seeds, and absent assets that fail where CI=true."""

from __future__ import annotations

import os
import random
import sys

import pytest
from costs import Costs

from mllm_jax.sharding.cpu import prepare_cpu
from mllm_jax.sharding.platform import has_flag

NUM_DEVICES = 8
MISSING_ASSET = "missing asset"

# Replaces the caller's settings, so that the suite is the same on every machine. Child processes inherit them.
if "jax" in sys.modules:
    raise pytest.UsageError("jax was imported before tests/conftest.py could choose its platform: drop the plugin")
os.environ["JAX_PLATFORMS"] = "cpu"
# By default XLA's pool has a thread per core. On two cores, eight devices can then wait in collectives that hold all
# threads, with none left for the devices that they wait for.
os.environ["NPROC"] = str(4 * NUM_DEVICES)
# Tests on toys spend nearly all their time on compiling. This leaves out LLVM's passes; XLA's own, such as partitioning
# and fusion, run as always. The fixture `optimized` restores them for large computations or users' code.
os.environ["JAX_DISABLE_MOST_OPTIMIZATIONS"] = "true"


# XLA's older emitters of fused loops compile in 40 to 65 % of the time (two measurements). Not every jaxlib has them.
if "PYTEST_XDIST_WORKER" not in os.environ:  # a worker has the flags of the process that started it
    _flags = [f"--xla_force_host_platform_device_count={NUM_DEVICES}", "--xla_cpu_use_fusion_emitters=false"]
    os.environ["XLA_FLAGS"] = " ".join(flag for flag in _flags if has_flag(flag))
    prepare_cpu()


def pytest_configure(config):
    config.pluginmanager.register(Costs())


@pytest.fixture(autouse=True)
def _seeds():
    """Sets the global random state at the start of each test."""
    import numpy as np

    random.seed(0)
    np.random.seed(0)


@pytest.fixture(scope="module")
def optimized():
    """Compiles a file's tests with all optimizations: `pytestmark = pytest.mark.usefixtures("optimized")`."""
    import jax

    name = "jax_disable_most_optimizations"
    assert jax.config.read(name), "tests/conftest.py sets it"
    jax.config.update(name, False)
    yield
    jax.config.update(name, True)


@pytest.fixture(scope="session")
def devices():
    """Returns the eight CPU devices."""
    import jax

    found = jax.devices()
    assert len(found) == NUM_DEVICES and found[0].platform == "cpu"
    return found


@pytest.fixture(scope="session")
def require_asset():
    """Returns `require_asset(condition, what)`: skips the test if `condition` is false, or fails it if CI=true.

    For a whole file or a mark, write the reason yourself: it begins with "missing asset: ".
    """

    def require(condition: object, what: str) -> None:
        if not condition:
            pytest.skip(f"{MISSING_ASSET}: {what}")

    return require


def _fail_if_asset_is_missing(report: pytest.TestReport | pytest.CollectReport) -> None:
    """Turns a skip because of a missing asset or package (`importorskip`) into a failure if CI=true."""
    if os.environ.get("CI") != "true" or report.outcome != "skipped" or hasattr(report, "wasxfail"):
        return
    reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)
    if MISSING_ASSET in reason or "could not import" in reason:
        report.outcome = "failed"
        report.longrepr = f"{reason}\nCI=true: what the tests need must be there, so this skip is a failure."


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item, call):
    report = yield
    _fail_if_asset_is_missing(report)
    return report


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report(collector):
    report = yield
    _fail_if_asset_is_missing(report)
    return report
