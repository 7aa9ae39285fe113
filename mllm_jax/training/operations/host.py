"""Settings of the host: for speed on a CPU, and for several CPU devices without a deadlock."""

from __future__ import annotations

import ctypes
import os
import sys

# Numbers of glibc's malloc.h (mallopt).
_TRIM_THRESHOLD, _TOP_PAD, _MMAP_THRESHOLD, _MMAP_MAX, _ARENA_MAX = -1, -2, -3, -4, -8
LARGE = 512 << 20  # bytes of a stage's state for which memory is not kept


def keep_freed_memory() -> bool:
    """Lets glibc keep freed memory for the next step instead of returning it; returns False on another libc.

    XLA allocates a step's temporaries anew each time. They are large, so malloc maps and unmaps them, and the system
    clears every page again: about a quarter of a step's time in the quickstart on two cores.
    """
    return _mallopt({_MMAP_MAX: 0, _TRIM_THRESHOLD: 2**31 - 1, _ARENA_MAX: 1, _TOP_PAD: 64 * 2**20})


def return_large_memory(state: int) -> bool:
    """Lets glibc return large freed blocks again if a stage's state, in bytes, is large; returns whether it does.

    Between blocks of hundreds of MB that come and go, a heap has holes too small for the next ones: one with a state of
    1.6 GB grew to 23 GB, until the system killed it. With large blocks mapped the same run takes 9 GB.
    """
    return state >= LARGE and _mallopt({_MMAP_THRESHOLD: 32 * 2**20, _MMAP_MAX: 2**16})


def _mallopt(options: dict[int, int]) -> bool:
    """Sets options of glibc's malloc; returns False on another libc."""
    if not sys.platform.startswith("linux"):
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError):
        return False
    return all([mallopt(option, value) for option, value in options.items()])


def enough_threads(devices: int) -> None:
    """Gives XLA's pool enough threads for more CPU devices than cores; call it before any use of a device.

    A collective holds a thread of each device while it waits for the others. The pool has one thread a core, so devices
    may wait for ever for one without a thread. XLA reads the pool's size from NPROC, which is kept if it is set.
    """
    if devices > (os.cpu_count() or 1):
        os.environ.setdefault("NPROC", str(4 * devices))
