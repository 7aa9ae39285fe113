"""Refuses arguments that no command can use, before anything is loaded."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence

from mllm_jax.errors import ConfigError

TEXTS = ("text", "system", "stop-strings", "prompt", "negative")  # options whose values are the user's text
SEVERAL = ("text", "stop-strings", "images", "tasks")  # options that take several values


def check_arguments(arguments: Sequence[str]) -> None:
    """Refuses text that is not UTF-8, and bucket addresses where a disk is needed.

    Args:
        arguments: the command's name and its arguments.

    Raises:
        ConfigError: a NUL byte, bytes that are not UTF-8, or an address such as gs://bucket/run for a file or folder.
    """
    for argument in arguments:
        try:
            argument.encode()
        except UnicodeEncodeError:  # Python decodes bytes that are not UTF-8 as surrogates
            raise ConfigError(
                f"the argument {argument!a}, which is not UTF-8", "text in UTF-8", "type it again, or rename the file"
            ) from None
        if "\0" in argument:
            raise ConfigError(f"the argument {argument!a} with a NUL byte", "text without one", "remove the NUL byte")
    command, *words = arguments
    for path in _paths(command, words):
        if re.match(r"[A-Za-z][A-Za-z0-9+.-]*://", path):
            raise ConfigError(
                f"mllm {command}: {path}",
                "a file or folder on a disk that is mounted here",
                "mount the bucket as a folder and name that; see launch/README.md, One file system",
            )


def _paths(command: str, words: Sequence[str]) -> Iterator[str]:
    """Yields the words that may name files and folders: all except questions, texts and fields of a config."""
    option, asked = None, False
    for word in words:
        if word.startswith("--"):
            option, _, value = word[2:].replace("_", "-").partition("=")
            if value and _may_be_path(option):
                yield value
            option = None if value else option
        elif option is not None:
            if _may_be_path(option):
                yield word
            option = option if option in SEVERAL else None
        elif not asked:
            yield word
            asked = command == "generate"  # the question follows the folder


def _may_be_path(option: str) -> bool:
    return option not in TEXTS and "." not in option
