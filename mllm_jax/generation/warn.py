"""Warnings that name the line of the user's program, however deep in the library they are noticed."""

from __future__ import annotations

import sys
import warnings

_PACKAGE = f"{__name__.partition('.')[0]}."


def warn_user(message: str) -> None:
    """Warns at the line that called the library."""
    frame, level = sys._getframe(1), 2  # 1 would be this function
    while frame.f_back is not None and frame.f_globals.get("__name__", "").startswith(_PACKAGE):
        frame, level = frame.f_back, level + 1
    warnings.warn(message, stacklevel=level)
