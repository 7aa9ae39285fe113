"""The help of a command that reads a config, on one screen; `--help-all` lists every field."""

from __future__ import annotations

import dataclasses
import re
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

WIDTH, COLUMN = 110, 34
ITEMS = 8  # of a tuple; of more only the first and the last are named


def config_help(command: str, options: Any, config: str) -> str:
    """The help: what belongs to the command, the fields at the top of the config, and how to change what is nested.

    Args:
        command: `train` or `plan`.
        options: the command's dataclass with its defaults; its field `experiment` is the config.
        config: the config's path, as it was typed.
    """
    about = _documented(options)
    lines = [f"usage: mllm {command} {config} [OPTIONS]", ""]
    for field in dataclasses.fields(options):
        if field.name != "experiment":
            lines += _row(_spelled(field.name, getattr(options, field.name)), about.get(field.name, ""))
    experiment = options.experiment
    lines += ["", "Fields of the config, with what it has; a nested one by its path:", ""]
    fields = [f for f in dataclasses.fields(experiment) if (f.type, getattr(experiment, f.name)) != ("Any", None)]
    plain = [f for f in fields if _is_plain(getattr(experiment, f.name))]
    lines += _wrapped(", ".join(_spelled(f.name, getattr(experiment, f.name)) for f in plain))
    for field in fields:
        value = getattr(experiment, field.name)
        if (example := None if field in plain else _example(field.name, value)) is not None:
            lines += _row(example, _shape(value))
    return "\n".join([*lines, "", f"mllm {command} {config} --help-all lists every field."])


def parsed(command: str, default: Any, arguments: Sequence[str]) -> Any:
    """What was typed after a command; None where that asks for help, which is then printed.

    Args:
        default: the command's dataclass with the config that `arguments` begin with.
    """
    import tyro

    config, *rest = arguments
    if not {"-h", "--help"}.isdisjoint(rest):
        print(config_help(command, default, config))
        return None
    return tyro.cli(
        type(default),
        args=["--help" if argument == "--help-all" else argument for argument in rest],
        default=default,
        prog=f"mllm {command} {config}",
        config=(tyro.conf.AvoidSubcommands,),
    )


def _documented(options: Any) -> dict[str, str]:
    """What the docstring says of each attribute."""
    found = re.findall(r"^ {8}(\w+): (.+(?:\n {12}.+)*)", type(options).__doc__, re.M)
    return {name: " ".join(text.split()).rstrip(".") for name, text in found}


def _is_plain(value: Any) -> bool:
    return value is None or isinstance(value, str | int | float | Path)


def _spelled(path: str, value: Any) -> str:
    """An option with a value, as it is typed."""
    name = path.replace("_", "-")
    if isinstance(value, bool):
        return f"--{'no-' if value else ''}{name}"
    if dataclasses.is_dataclass(value):
        first = dataclasses.fields(value)[0]
        return _spelled(f"{path}.{first.name}", getattr(value, first.name))
    return f"--{name} {_word(path) if value is None or not _is_plain(value) else value}"


def _word(path: str) -> str:
    return path.rpartition(".")[2].rpartition("_")[2].upper()


def _example(path: str, value: Any) -> str | None:
    """The option of a number somewhere in a field of the config, the nearest first; None: there is none."""
    children = [(path, value)]
    while children:
        below = []
        for name, child in children:
            if isinstance(child, int | float) and not isinstance(child, bool):
                return _spelled(name, child)
            if dataclasses.is_dataclass(child):
                below += [(f"{name}.{f.name}", getattr(child, f.name)) for f in dataclasses.fields(child)]
            elif isinstance(child, Mapping):
                below += [(f"{name}.{key}", item) for key, item in child.items()]
            elif isinstance(child, tuple):
                below += [(f"{name}.{index}", item) for index, item in enumerate(child)]
        children = below
    return None


def _shape(value: Any) -> str:
    """What a nested field is, in a few words."""
    if isinstance(value, tuple):
        named = [f"{index} {getattr(item, 'name', type(item).__name__)}" for index, item in enumerate(value)]
        return ", ".join(named if len(named) <= ITEMS else [named[0], "...", named[-1]])
    fields = {f.name: getattr(value, f.name) for f in dataclasses.fields(value)}
    parts = [name for name, part in fields.items() if dataclasses.is_dataclass(part) or isinstance(part, Mapping)]
    return type(value).__name__ + (f": {', '.join(parts)}" if parts else "")


def _row(left: str, right: str) -> list[str]:
    if len(left) >= COLUMN - 3:
        return [f"  {left}", *_wrapped(right, COLUMN)]
    first, *rest = _wrapped(right, COLUMN) or [""]
    return [f"  {left}".ljust(COLUMN) + first.strip(), *rest]


def _wrapped(text: str, indent: int = 2) -> list[str]:
    margin = " " * indent
    return textwrap.wrap(text, WIDTH, initial_indent=margin, subsequent_indent=margin, break_on_hyphens=False)
