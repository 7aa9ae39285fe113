"""What files of records have in common: values in messages, and names of files inside one folder."""

from __future__ import annotations

import os
import reprlib
from pathlib import PureWindowsPath
from typing import Any


def short(value: Any) -> str:
    """A value for a message, however long or deep it is."""
    return _REPR.repr(value)


_REPR = reprlib.Repr()
_REPR.maxstring = _REPR.maxother = 100


def encodable(text: str) -> bool:
    """Whether UTF-8 can write the text: JSON can spell half of a pair of surrogates."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def may_name_file(name: Any) -> bool:
    """Whether a value is a name that a file can have."""
    return isinstance(name, str) and bool(name) and "\0" not in name and encodable(name)


def inside(name: str) -> str | None:
    """The relative path that a name means; None: it leads out of its folder.

    Symbolic links in that folder are followed, also out of it: a record cannot make one, and data sets are often linked
    into a folder.
    """
    path = os.path.normpath(name)
    if PureWindowsPath(name).drive or os.path.isabs(name) or path.split(os.sep)[0] == "..":
        return None
    return path
