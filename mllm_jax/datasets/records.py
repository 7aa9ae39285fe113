"""What readers of people's own records share: whether a text can be one, and which file a name means."""

from __future__ import annotations

import os
import reprlib
from pathlib import Path, PureWindowsPath
from typing import Any

_REPR = reprlib.Repr()
_REPR.maxstring = _REPR.maxother = 100


def short(value: Any) -> str:
    """A value for a message, however long or deep it is."""
    return _REPR.repr(value)


def encodable(text: str) -> bool:
    """Whether UTF-8 can write the text: JSON can spell half of a pair of surrogates."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def names_a_file(name: str) -> bool:
    return "\0" not in name and encodable(name)


def inside(folder: Path, name: str) -> Path | None:
    """The path of a file that a record names, relative to a folder; None: the name leads out of the folder.

    Symbolic links in the folder are followed: a record cannot make one.
    """
    path = os.path.normpath(name)
    if PureWindowsPath(name).drive or os.path.isabs(name) or path.split(os.sep)[0] == "..":
        return None
    return folder / path
