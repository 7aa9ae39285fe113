"""A lock that lets one process at a time write a run folder; it ends with the process and names its holder."""

from __future__ import annotations

import errno
import json
import os
import socket
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from mllm_jax.errors import RunFolderError

MARK = ".mllm_run"  # the lock's file; no other program uses the name, so a folder with it was made here
HERE_SECONDS, ELSEWHERE_SECONDS = 10.0, 100.0
_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL)


@contextmanager
def held(folder: Path) -> Iterator[None]:
    """Holds an existing folder for this process until the block or the process ends, however it ends.

    The lock is `flock` on a file in the folder, which Linux also keeps over NFS. A disk without locks, such as some
    mounted buckets, is not locked, with a warning.

    If the holder may end soon, this waits: 10 s for a killed process of this host; 100 s for a process of another host,
    whose lock NFS keeps for a while after the host is gone.

    Raises:
        RunFolderError: another process holds it, whose host and number the message has; or the lock cannot be
            written.
    """
    try:
        file = os.open(folder / MARK, os.O_RDWR | os.O_CREAT, 0o666)
    except OSError as error:
        raise unwritable(folder / MARK, error) from error
    try:
        if _lock(file, folder):
            _say_who(file, folder)
        yield
    finally:
        os.close(file)  # this unlocks it; the file stays, as another process may be about to lock it


def _lock(file: int, folder: Path) -> bool:
    """Locks the file; returns False if the disk has no locks."""
    try:
        import fcntl
    except ImportError:  # Windows
        return _without_locks(folder)
    began = time.monotonic()
    while True:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
        except BlockingIOError:
            holder = _holder(file)
            if time.monotonic() - began >= _patience(holder):
                raise _taken(folder, holder) from None
            time.sleep(0.2)
        except OSError as error:
            if error.errno not in _NO_LOCKS:
                raise unwritable(folder / MARK, error) from error
            return _without_locks(folder)


def _without_locks(folder: Path) -> bool:
    warnings.warn(f"{folder}: no locks here, so nothing keeps a second process from writing there", stacklevel=5)
    return False


def _say_who(file: int, folder: Path) -> None:
    who = {"host": socket.gethostname(), "process": os.getpid(), "since": time.strftime("%Y-%m-%d %H:%M:%S")}
    try:
        os.ftruncate(file, 0)
        os.pwrite(file, (json.dumps(who) + "\n").encode(), 0)
    except OSError as error:  # a full disk: the file is locked, but no run could be trained there
        raise unwritable(folder / MARK, error) from error


def _holder(file: int) -> dict[str, Any]:
    """Reads what the holder wrote; empty if it has written nothing yet."""
    try:
        found = json.loads(os.pread(file, 4096, 0))
        return found if isinstance(found, dict) else {}
    except (ValueError, RecursionError):
        return {}


def _patience(holder: dict[str, Any]) -> float:
    """Returns the seconds to wait for a holder: 0 if it is alive on this host."""
    if holder.get("host") != socket.gethostname():
        return ELSEWHERE_SECONDS if holder else HERE_SECONDS
    return 0.0 if _alive(holder.get("process")) else HERE_SECONDS


def _alive(process: Any) -> bool:
    if not isinstance(process, int) or process < 1:
        return False
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # another user's
        return True
    return True


def _taken(folder: Path, holder: dict[str, Any]) -> RunFolderError:
    who = "another process"
    if holder:
        who = f"process {holder.get('process')} on host {holder.get('host')} since {holder.get('since')}"
    return RunFolderError(
        f"{folder}, which {who} is writing",
        "one process at a time in a run folder",
        "wait for its end or stop it, or choose another --run-dir",
    )


def unwritable(path: Path, error: OSError) -> RunFolderError:
    """Returns the error about a run folder, or a file in it, that cannot be written."""
    return RunFolderError(
        f"{path}: {error.strerror or error}",
        "a folder that can be written, with room on its disk",
        "permit writing, free space or choose another --run-dir",
    )
