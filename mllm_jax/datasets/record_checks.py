"""Checks for files of records: values in messages, and names of files inside one folder."""

from __future__ import annotations

import os
import reprlib
from pathlib import PureWindowsPath
from typing import Any


def short(value: Any) -> str:
    """Returns a value as text for a message, whatever its length or depth."""
    return _REPR.repr(value)


_REPR = reprlib.Repr()
_REPR.maxstring = _REPR.maxother = 100


def encodable(text: str) -> bool:
    """Returns whether UTF-8 can encode the text: JSON can spell half of a surrogate pair."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def may_name_file(name: Any) -> bool:
    """Returns whether a value can be the name of a file."""
    return isinstance(name, str) and bool(name) and "\0" not in name and encodable(name)


def inside(name: str) -> str | None:
    """Returns the relative path that a name means, or None if it leads out of its folder.

    Symbolic links in that folder are followed, also out of it: a record cannot make one, and data sets are often linked
    into a folder.
    """
    path = os.path.normpath(name)
    if PureWindowsPath(name).drive or os.path.isabs(name) or path.split(os.sep)[0] == "..":
        return None
    return path
