"""The console of all commands, and the messages and exit codes of failures."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING

from mllm_jax.errors import MllmError

if TYPE_CHECKING:
    from rich.console import Console


def console() -> Console:
    from rich.console import Console

    console = Console()
    if not console.is_terminal:  # a file or a pipe: do not fit tables into 80 columns
        console.width = max(console.width, 120)
    return console


def refused(command: Callable[[], int]) -> int:
    """Runs a command and returns its exit code; prints a refusal to standard error without a traceback."""
    try:
        code = command()
        sys.stdout.flush()
        return code
    except MllmError as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return 2
    except BrokenPipeError:  # the reader has closed the pipe, as `| head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # so that Python's last flush does not fail
        return 128 + signal.SIGPIPE
    except OSError as error:  # not a bug of this library: a disk, a file or a permission
        refusal = MllmError(
            f"{type(error).__name__}: {error}",
            "files and folders that can be read and written, with room on the disk",
            "correct that, then start the same command again",
        )
        print(refusal, file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted; what was saved before stays", file=sys.stderr)
        return 130
