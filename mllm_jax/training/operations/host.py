"""Settings of the host: for speed on a CPU, and for several CPU devices without a deadlock."""

from __future__ import annotations

import ctypes
import os
import sys

# Numbers of glibc's malloc.h (mallopt).
_TRIM_THRESHOLD, _TOP_PAD, _MMAP_MAX, _ARENA_MAX = -1, -2, -4, -8


def keep_freed_memory() -> bool:
    """Lets glibc keep freed memory for the next step instead of returning it; returns False on another libc.

    XLA allocates a step's temporaries anew each time. They are large, so malloc maps and unmaps them, and the system
    clears every page again: about a quarter of a step's time in the quickstart on two cores.
    """
    if not sys.platform.startswith("linux"):
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError):
        return False
    options = {_MMAP_MAX: 0, _TRIM_THRESHOLD: 2**31 - 1, _ARENA_MAX: 1, _TOP_PAD: 64 * 2**20}
    return all([mallopt(option, value) for option, value in options.items()])


def enough_threads(devices: int) -> None:
    """Gives XLA's pool enough threads for more CPU devices than cores; call it before any use of a device.

    A collective holds a thread of each device while it waits for the others. The pool has one thread a core, so devices
    may wait for ever for one without a thread. XLA reads the pool's size from NPROC, which is kept if it is set.
    """
    if devices > (os.cpu_count() or 1):
        os.environ.setdefault("NPROC", str(4 * devices))
