"""Safe reading (regular files of bounded size, JSON with the library's errors) and atomic writing of files."""

from __future__ import annotations

import contextlib
import json
import os
import stat
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

from mllm_jax.errors import MllmError

JSON_BYTES = 256 << 20  # the vocabulary of a large tokenizer is about 30 MB
_KINDS = {dict: "object", list: "list"}


def open_regular(path: Path | str, error: type[MllmError]) -> BinaryIO:
    """Opens a regular file for reading; does not wait for a FIFO.

    Raises:
        FileNotFoundError, PermissionError and other OSErrors: as `open` raises them.
        error: not a regular file, or a name that no file can have.
    """
    try:
        # O_NONBLOCK: opening a FIFO without a writer would wait for one.
        number = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
    except ValueError as problem:  # a NUL byte, or a character that the file system cannot encode
        raise error(f"the name {str(path)!a}: {problem}", "the name of a file", "change the name") from problem
    mode = os.fstat(number).st_mode
    if stat.S_ISREG(mode):
        return os.fdopen(number, "rb")
    os.close(number)
    if stat.S_ISDIR(mode):
        raise IsADirectoryError(f"{path} is a folder")
    raise error(f"{path}, not a regular file", "a file, not a pipe, a socket or a device", "name another file")


def read_bytes(path: Path | str, limit: int, error: type[MllmError]) -> bytes:
    """Reads a regular file of at most `limit` bytes; never reads a device or a huge sparse file.

    Raises:
        OSError, error: as `open_regular`; also `error`: too large.
    """
    with open_regular(path, error) as file:
        size = os.fstat(file.fileno()).st_size
        if size > limit:
            raise error(f"{path} of {size:,} bytes", f"at most {limit:,} bytes", "name another file")
        return file.read(limit + 1)


def parse_json(
    content: bytes | str,
    name: str,
    error: type[MllmError],
    kind: type = dict,
    *,
    pairs: Callable[[list], Any] | None = None,
    todo: str = "fetch the file again",
) -> Any:
    """Parses JSON whose top level is a `kind` (dict, list or object for any).

    Args:
        name: the name in the message.
        pairs: as `object_pairs_hook` of `json.loads`.

    Raises:
        error: invalid UTF-8, invalid JSON, too deep a nesting, or another kind at the top level.
    """
    try:
        value = json.loads(content, object_pairs_hook=pairs)
    except RecursionError as problem:
        raise error(f"{name}, nested too deeply", "JSON with few levels", todo) from problem
    except ValueError as problem:  # UnicodeDecodeError is one
        raise error(f"{name}: {problem}", "JSON in UTF-8", todo) from problem
    if not isinstance(value, kind):
        raise error(f"{name} with a {type(value).__name__}", f"a JSON {_KINDS.get(kind, kind.__name__)}", todo)
    return value


def read_json(path: Path | str, error: type[MllmError], kind: type = dict, *, limit: int = JSON_BYTES) -> Any:
    """Reads a JSON file whose top level is a `kind`.

    Raises:
        FileNotFoundError and other OSErrors: as `open` raises them.
        error: see `read_bytes` and `parse_json`.
    """
    return parse_json(read_bytes(path, limit, error), str(path), error, kind)


def write_atomic(path: Path | str, content: str | bytes | Callable[[BinaryIO], object]) -> None:
    """Writes a file atomically: it is complete on the disk before it gets its name, else the old file stays.

    The temporary file is in the same folder. Its name begins with a dot and the file's name and is unique over
    processes and hosts.

    Args:
        content: text (stored as UTF-8), bytes, or a function that writes to the open file.

    Raises:
        OSError: opening, writing or renaming failed; also everything that `content` raises.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name[:48]}.{uuid.uuid4().hex}")  # cut: a name has at most 255 bytes
    try:
        with temporary.open("wb") as file:
            if callable(content):
                content(file)
            else:
                file.write(content.encode() if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise
