"""Configs as JSON and back."""

from __future__ import annotations

import collections.abc
import dataclasses
import sys
import types
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mllm_jax.checkpoints import own_modules
from mllm_jax.errors import ConfigError

CLASS, FUNCTION = "class", "function"
# Parts of this package whose functions a config may name. The config of a run from elsewhere can choose them too, so
# none of them may do harm.
FUNCTIONS = ("datasets", "evaluation")


def describe(value: Any) -> Any:
    """Returns a config as JSON.

    A dataclass becomes an object with its class under "class", and a function an object with its name under "function".
    Other objects are mappings.

    Raises:
        ConfigError: another value that is not plain data, or a class or function that cannot be imported when the run
            is opened.
    """
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = {f.name: describe(getattr(value, f.name)) for f in dataclasses.fields(value) if f.init}
        return {CLASS: _importable(type(value), "class"), **fields}
    if isinstance(value, types.FunctionType):
        return {FUNCTION: _importable(value, "function")}
    if isinstance(value, Mapping) and all(isinstance(key, str) for key in value) and not {CLASS, FUNCTION} & {*value}:
        return {key: describe(one) for key, one in value.items()}
    if isinstance(value, (list, tuple)):
        return [describe(v) for v in value]
    if isinstance(value, (str, int, float, bool)) or value is None:
        return value
    raise ConfigError(f"a config value {value!r}", "dataclasses, tuples, strings, numbers", "replace it by plain data")


def _importable(value: Any, kind: str) -> str:
    """Returns where a class or function is imported from, as "module:name"."""
    if value.__module__ in ("<run_path>", "__main__"):
        raise ConfigError(
            f"the {kind} {value.__qualname__}, which the config file itself defines",
            f"a {kind} that a run can import when it is opened again",
            "move it into a file beside the config and import it from there",
        )
    if not value.__qualname__.isidentifier():
        raise ConfigError(
            f"the {kind} {value.__qualname__} of {value.__module__}",
            f"a {kind} at the top level of a module, which a run can import when it is opened again",
            "give it a name there; put what it closes over into the fields of a dataclass",
        )
    if isinstance(value, types.FunctionType) and not _may_be_named(value, value.__qualname__):
        raise ConfigError(
            f"the function {value.__qualname__} of {value.__module__}",
            "a function of a file beside the config, or of mllm_jax.evaluation",
            "call it in your own function, in a file beside the config",
        )
    return f"{value.__module__}:{value.__qualname__}"


def _may_be_named(function: types.FunctionType, name: str) -> bool:
    """Returns whether a config may name a function: by its own name, and not of Python or an installed package."""
    module = sys.modules.get(function.__module__)
    if getattr(module, name, None) is not function:
        return False
    top, *parts = module.__name__.split(".")
    if top == own_modules.PACKAGE:
        return bool(parts) and parts[0] in FUNCTIONS
    file = getattr(module, "__file__", None) or ""
    installed = {"site-packages", "dist-packages"}.intersection(Path(file).parts)
    return bool(file) and top not in sys.stdlib_module_names and not installed


def rebuild(description: Any) -> Any:
    """Inverts `describe`; classes are from this package or from a user's own modules, see `own_modules`.

    Raises:
        ConfigError: a class or module that does not exist (any more), unknown fields, or values of another type.
    """
    if isinstance(description, list):
        return tuple(rebuild(v) for v in description)
    if not isinstance(description, dict):
        return description
    fields = {k: rebuild(v) for k, v in description.items() if k not in (CLASS, FUNCTION)}
    if not {CLASS, FUNCTION} & {*description}:
        return fields
    kind = description.get(CLASS, description.get(FUNCTION))
    module, _, name = kind.partition(":") if isinstance(kind, str) else ("", "", "")
    if not name.isidentifier() or not all(part.isidentifier() for part in module.split(".")):
        raise ConfigError(f"a stored config of class {kind!r:.200}", "module:Class", "build the experiment in Python")
    try:
        found = getattr(own_modules.find(module, kind), name)
        if FUNCTION in description:
            named = isinstance(found, types.FunctionType) and found.__module__ == module
            if fields or not named or not _may_be_named(found, name):
                raise TypeError("not a function that a config may name")
            return found
        if not (isinstance(found, type) and dataclasses.is_dataclass(found)):
            raise TypeError("not a config class")
        _check_types(found, fields)
        return found(**fields)
    except (ImportError, AttributeError, NameError, TypeError) as error:
        raise ConfigError(
            f"a stored {kind}: {error}", "classes and fields of this version", "use the version that wrote it"
        ) from error


def _check_types(kind: type, fields: dict[str, Any]) -> None:
    """Raises TypeError, with their names, for fields whose value is not of the annotated type."""
    hints = typing.get_type_hints(kind)
    wrong = [name for name, value in fields.items() if name in hints and not fits(value, hints[name])]
    if wrong:
        declared = {field.name: field.type for field in dataclasses.fields(kind)}
        raise TypeError(", ".join(f"{name}={fields[name]!r:.80}, expected {declared.get(name)}" for name in wrong))


def fits(value: Any, hint: Any) -> bool:
    """Returns whether a value from JSON is of an annotated type; an int is a float, a bool is not a number."""
    if hint is Any:
        return True
    origin, inner = typing.get_origin(hint), typing.get_args(hint)
    if origin is typing.Literal:
        return any(value == allowed and type(value) is type(allowed) for allowed in inner)
    if origin in (typing.Union, types.UnionType):
        return any(fits(value, one) for one in inner)
    if origin is tuple:
        if not isinstance(value, tuple):
            return False
        each = [inner[0]] * len(value) if inner[-1:] == (...,) else inner
        return len(each) == len(value) and all(map(fits, value, each))
    if origin in (collections.abc.Mapping, dict):
        return isinstance(value, Mapping) and all(fits(k, inner[0]) and fits(v, inner[1]) for k, v in value.items())
    if origin is collections.abc.Callable:
        return callable(value)
    if hint in (int, float):
        return isinstance(value, (int, float) if hint is float else int) and not isinstance(value, bool)
    if hint is None:
        return value is None
    vague = getattr(hint, "_is_protocol", False) and not getattr(hint, "_is_runtime_protocol", False)
    if isinstance(hint, type) and not vague:
        return isinstance(value, hint)
    return dataclasses.is_dataclass(value)  # a protocol that isinstance cannot check
