"""Bad input of every kind is refused in words or read; `python tests/fuzz.py --cases 10000` runs more of it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import fuzz
import pytest

CASES = 300
LIMITS = ("30", "240")  # seconds of work and on the clock: the first case imports jax, and the machine may be busy


@pytest.mark.parametrize("kind", fuzz.kinds())
def test_nothing_is_unhandled(kind):
    """Runs the cases in another process, so that bad input kills only that, and timers are not shared."""
    command = [sys.executable, fuzz.__file__, "--kinds", kind, "--cases", str(CASES), "--limits", *LIMITS]
    done = subprocess.run(command, capture_output=True, text=True, cwd=Path(fuzz.__file__).parents[1])
    assert done.returncode == 0, f"exit status {done.returncode}\n{done.stdout}\n{done.stderr[-4000:]}"
    name, cases, refused, _, unhandled, _ = done.stdout.splitlines()[-1].split()
    assert (name, int(cases), int(unhandled)) == (kind, CASES, 0) and int(refused) > 100, done.stdout
