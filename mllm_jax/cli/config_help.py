"""The help of a command that reads a config: common options on one screen, every field by `--help-all`."""

from __future__ import annotations

import dataclasses
import re
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from mllm_jax.errors import ConfigError
from mllm_jax.layers.compute import WithCompute

WIDTH, COLUMN = 100, 34
STAGES = 8  # number of stages of an experiment that are shown
COLUMNS = ("steps", "optimizer.learning_rate", "data.rows")  # of the table of stages
AXES = ("data", "fsdp", "context", "tensor")


def config_help(command: str, options: Any, config: str) -> str:
    """Formats the help on one screen: the command's options, the common options of the config, and examples.

    Args:
        command: `train` or `plan`.
        options: the command's dataclass with its defaults; its field `experiment` is the config.
        config: the config's path, as typed.
    """
    about, experiment = _documented(options), options.experiment
    typed = f"mllm {command} {config}"
    lines = [f"usage: {typed} [OPTIONS]", ""]
    for field in dataclasses.fields(options):
        if field.name != "experiment":
            lines += _row(_spelled(field.name, getattr(options, field.name)), about.get(field.name, ""))
    lines += ["", "Common options of the config, with their values:", "", *_stages(experiment.stages), ""]
    for spelled, text in _common(experiment):
        lines += _row(spelled, text)
    typed_for = f"{typed} --topology v5p-128" if command == "plan" else typed
    lines += ["", "Examples:"]
    for change in ("--stages.0.data.rows 8", "--mesh.data 1 --mesh.fsdp -1"):
        lines += [f"  {typed_for} {change}"]
    lines += ["", f"{typed} --help-all lists every field,", "and --help-all WORD those with WORD in their names."]
    return "\n".join(lines)


def parsed(command: str, default: Any, arguments: Sequence[str]) -> Any:
    """Parses a command's arguments; prints help and returns None if they ask for it.

    Args:
        default: the command's dataclass with the config that `arguments` begin with.

    Raises:
        ConfigError: help for a word that no field's name contains.
    """
    import tyro

    config, *rest = arguments
    if not {"-h", "--help"}.isdisjoint(rest):
        print(config_help(command, default, config))
        return None
    word = rest[rest.index("--help-all") + 1 :][:1] if "--help-all" in rest else []
    if word and not word[0].startswith("-"):
        print(fields_with(word[0], default))
        return None
    return tyro.cli(
        type(default),
        args=["--help" if argument == "--help-all" else argument for argument in rest],
        default=default,
        prog=f"mllm {command} {config}",
        config=(tyro.conf.AvoidSubcommands,),
    )


def fields_with(word: str, options: Any) -> str:
    """Lists every field whose path contains a word, as it is typed, with the description in its class.

    Raises:
        ConfigError: there is no such field.
    """
    wanted, lines, described = _dashed(word).lower(), [], set()
    for path, value, owner in _leaves("", options):
        path = path.removeprefix("experiment.")
        if wanted not in _dashed(path).lower():
            continue
        name = path.rpartition(".")[2]
        lines += _row(_spelled(path, value), "" if (owner, name) in described else _documented(owner).get(name, ""))
        described.add((owner, name))
    if not lines:
        raise ConfigError(f"--help-all {word}: no field's name contains it", "part of a name", "try --help-all alone")
    return "\n".join(lines)


def _stages(stages: Sequence[Any]) -> list[str]:
    """Formats the table of stages, with a column for each common option."""
    head = ["stage N", *(f"--{_dashed(f'stages.N.{column}')}" for column in COLUMNS)]
    rows = [head]
    for index, stage in enumerate(stages[:STAGES]):
        rows.append([f"{index} {stage.name}", *(str(_at(stage, column)) for column in COLUMNS)])
    widths = [max(len(row[i]) for row in rows) for i in range(len(head))]
    cells = [[row[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(row[1:], widths[1:], strict=True))] for row in rows]
    more = [f"  ... {len(stages) - 1} {stages[-1].name}"] if len(stages) > STAGES else []
    return ["  " + "  ".join(row).rstrip() for row in cells] + more


def _common(experiment: Any) -> Iterator[tuple[str, str]]:
    """Yields common options outside of the stages, with their descriptions."""
    about = _documented(experiment)
    if isinstance(experiment.model, WithCompute):
        compute = experiment.model.compute
        yield f"--model.compute.dtype {compute.dtype or 'float32'}", "of the whole model, such as bfloat16"
        yield f"--model.compute.remat {compute.remat or 'none'}", "recomputed in the backward pass: full, dots"
    if (size := getattr(getattr(experiment.model, "llm", None), "hidden_size", None)) is not None:
        yield f"--model.llm.hidden-size {size}", "the width of the LLM and of the projectors' outputs"
    yield " ".join(f"--mesh.{axis} {getattr(experiment.mesh, axis)}" for axis in AXES), "-1: the remaining devices"
    for name in ("cpu_devices", "seed"):
        yield _spelled(name, getattr(experiment, name)), about.get(name, "")


def _at(value: Any, path: str) -> Any:
    for name in path.split("."):
        value = getattr(value, name)
    return value


def _children(value: Any) -> list[tuple[str, Any]]:
    """Returns the values nested in a value, with their names in a path."""
    if dataclasses.is_dataclass(value):
        return [(field.name, getattr(value, field.name)) for field in dataclasses.fields(value)]
    if isinstance(value, Mapping):
        return [*value.items()]
    nested = isinstance(value, tuple) and any(dataclasses.is_dataclass(item) for item in value)
    return [(str(index), item) for index, item in enumerate(value)] if nested else []


def _leaves(path: str, value: Any, owner: Any = None) -> Iterator[tuple[str, Any, Any]]:
    """Yields the path, the value and the class of every field without nested fields."""
    if children := _children(value):
        inner = type(value) if dataclasses.is_dataclass(value) else owner
        for name, child in children:
            yield from _leaves(f"{path}.{name}".lstrip("."), child, inner)
    else:
        yield path, value, owner


def _documented(config: Any) -> dict[str, str]:
    """Reads the description of each attribute from the docstring of a dataclass."""
    kind = config if isinstance(config, type) else type(config)
    found = re.findall(r"^ {8}(\w[\w, ]*): (.+(?:\n {12}.+)*)", kind.__doc__ or "", re.M)
    return {name: " ".join(text.split()).rstrip(".") for names, text in found for name in names.split(", ")}


def _is_plain(value: Any) -> bool:
    return value is None or isinstance(value, str | int | float | Path)


def _dashed(path: str) -> str:
    return path.replace("_", "-")


def _spelled(path: str, value: Any) -> str:
    """Formats an option with a value, as it is typed."""
    name = _dashed(path)
    if isinstance(value, bool):
        return f"--{'no-' if value else ''}{name}"
    if dataclasses.is_dataclass(value):
        first = dataclasses.fields(value)[0]
        return _spelled(f"{path}.{first.name}", getattr(value, first.name))
    if isinstance(value, tuple) and value and all(map(_is_plain, value)):
        return f"--{name} {' '.join(map(str, value))}"
    return f"--{name} {_word(path) if value is None or not _is_plain(value) else value}"


def _word(path: str) -> str:
    return path.rpartition(".")[2].rpartition("_")[2].upper()


def _row(left: str, right: str) -> list[str]:
    if len(left) >= COLUMN - 3:
        return [f"  {left}", *_wrapped(right, COLUMN)]
    first, *rest = _wrapped(right, COLUMN) or [""]
    return [(f"  {left}".ljust(COLUMN) + first.strip()).rstrip(), *rest]


def _wrapped(text: str, indent: int = 2) -> list[str]:
    margin = " " * indent
    return textwrap.wrap(text, WIDTH, initial_indent=margin, subsequent_indent=margin, break_on_hyphens=False)
