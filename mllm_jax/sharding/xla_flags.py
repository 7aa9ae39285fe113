"""XLA's flags. An unknown one ends the process that starts XLA, so a child process is asked first."""

from __future__ import annotations

import os
import subprocess
import sys
from functools import cache

# XLA reads its flags when options for a compilation are first made. No device is started, so this takes 0.3 s.
_READS_FLAGS = "from jaxlib.xla_client import CompileOptions; CompileOptions()"


@cache
def has_flag(flag: str) -> bool:
    """Asks a child process whether the installed jaxlib accepts a flag, given as XLA_FLAGS would have it."""
    command = [sys.executable, "-P", "-c", _READS_FLAGS]  # -P: no module of the working directory
    child = subprocess.run(
        command, env={**os.environ, "XLA_FLAGS": flag}, capture_output=True, stdin=subprocess.DEVNULL
    )
    return child.returncode == 0
