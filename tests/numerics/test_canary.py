"""The compiler computes the sum correctly on CPUs, and the test fails if it does not."""

from __future__ import annotations

import os
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.usefixtures("optimized")

CANARY = Path(__file__).parent / "canary.py"
canary = runpy.run_path(str(CANARY), run_name="canary")


@pytest.mark.parametrize("rows", canary["ROWS"])
def test_no_row_is_summed_wrongly(rows):
    assert canary["wrong_rows"](rows) == 0


@pytest.mark.slow
@pytest.mark.skipif(sys.version_info[:2] != (3, 11), reason="one Python is enough: the oldest, which would install it")
def test_the_canary_fails_under_the_jaxlib_that_is_excluded(tmp_path, require_asset):
    """Runs an environment with jaxlib 0.10.2, which pyproject.toml excludes."""
    subprocess.run([sys.executable, "-m", "venv", tmp_path / "venv"], check=True, timeout=60)
    python = tmp_path / "venv" / ("Scripts" if os.name == "nt" else "bin") / "python"
    packages = ["jax==0.10.2", "jaxlib==0.10.2", "numpy>=2"]
    command = [python, "-m", "pip", "install", "--quiet", "--only-binary=:all:", *packages]
    install = subprocess.run(command, capture_output=True, text=True, timeout=300)
    require_asset(install.returncode == 0, f"jaxlib 0.10.2 from the package index: {install.stderr[-300:]}")
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("JAX", "XLA", "PYTHON"))}
    done = subprocess.run(
        [python, CANARY], env=environment | {"JAX_PLATFORMS": "cpu"}, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    wrong = dict(zip(canary["ROWS"], map(int, done.stdout.split()), strict=True))
    assert wrong[32_769] > 0 and wrong[40_000] > 5_000, wrong
