"""Configs as JSON and back."""

from __future__ import annotations

import dataclasses
import sys
import types
import typing
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from mllm_jax.checkpoints import own_modules
from mllm_jax.errors import ConfigError

# Parts of this package whose functions a config may name. A run folder that came from elsewhere chooses them too, so
# none of them may do what its owner would not want.
FUNCTIONS = ("datasets", "evaluation")
OWN_FUNCTION = "a function at the top level of a file beside the config, or of mllm_jax.evaluation"


def describe(value: Any) -> Any:
    """A config as JSON: a dataclass becomes an object with its class under "class".

    A function becomes {"function": "module:name"}, a mapping {"mapping": {...}}.

    Raises:
        ConfigError: what is none of these and no plain data, or a class or function that cannot be imported again.
    """
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        if type(value).__module__ in ("<run_path>", "__main__"):
            raise ConfigError(
                f"the class {type(value).__qualname__}, which the config file itself defines",
                "a class that a run can import when it is opened again",
                "move it into a file beside the config and import it from there",
            )
        fields = {f.name: describe(getattr(value, f.name)) for f in dataclasses.fields(value) if f.init}
        return {"class": f"{type(value).__module__}:{type(value).__qualname__}", **fields}
    if isinstance(value, types.FunctionType):
        return {"function": _function_name(value)}
    if isinstance(value, Mapping) and all(isinstance(key, str) for key in value):
        return {"mapping": {key: describe(item) for key, item in value.items()}}
    if isinstance(value, (list, tuple)):
        return [describe(v) for v in value]
    if isinstance(value, (str, int, float, bool)) or value is None:
        return value
    raise ConfigError(
        f"a config value {value!r}",
        "dataclasses, tuples, mappings of strings, functions of a module, strings, numbers",
        "replace it by plain data",
    )


def _function_name(function: types.FunctionType) -> str:
    """Gives the "module:name" by which `rebuild` finds a function."""
    module, name = function.__module__, function.__qualname__
    found = getattr(sys.modules.get(module), name, None)
    if found is not function or module == "__main__" or not _may_be_named(sys.modules[module]):
        own = "which the config file itself defines" if module in ("<run_path>", "__main__") else f"of {module}"
        raise ConfigError(
            f"the function {name}, {own}",
            OWN_FUNCTION + ", so that a run finds it again: no lambda, no function inside another",
            "move it into a file beside the config and import it from there",
        )
    return f"{module}:{name}"


def _may_be_named(module: types.ModuleType) -> bool:
    """Returns whether a config may name a module's functions: not Python's own, nor those of what pip installed."""
    top, *inner = module.__name__.split(".")
    if top == own_modules.PACKAGE:
        return inner[:1] in [[part] for part in FUNCTIONS]
    file = getattr(module, "__file__", None)
    installed = {"site-packages", "dist-packages"}.intersection(Path(file or "").parts)
    return file is not None and top not in sys.stdlib_module_names and not installed


def rebuild(description: Any) -> Any:
    """The inverse of `describe`; what it names is of this package, or of a user's own modules, see `own_modules`.

    Raises:
        ConfigError: a class, function or module that does not exist (any more), fields it does not know, or values of
            another type.
    """
    if isinstance(description, list):
        return tuple(rebuild(v) for v in description)
    if not isinstance(description, dict):
        return description
    if isinstance(items := description.get("mapping"), dict) and len(description) == 1:
        from flax.core import FrozenDict

        return FrozenDict({key: rebuild(item) for key, item in items.items()})
    if isinstance(name := description.get("function"), str) and len(description) == 1:
        return _named(name, "function", _as_function)
    fields = {k: rebuild(v) for k, v in description.items() if k != "class"}
    return _named(description.get("class", ""), "class", lambda module, name: _as_config(module, name, fields))


def _named(kind: Any, what: str, make: Callable[[types.ModuleType, str], Any]) -> Any:
    """Makes a value of what a description calls "module:name"."""
    module, _, name = kind.partition(":") if isinstance(kind, str) else ("", "", "")
    if not name.isidentifier() or not all(part.isidentifier() for part in module.split(".")):
        raise ConfigError(
            f"a stored config of {what} {kind!r:.200}", f"module:{what.title()}", "build the experiment in Python"
        )
    try:
        return make(own_modules.find(module, kind), name)
    except (ImportError, AttributeError, NameError, TypeError) as error:
        raise ConfigError(
            f"a stored {kind}: {error}", "what this version knows", "use the version that wrote it"
        ) from error


def _as_function(module: types.ModuleType, name: str) -> Callable:
    found = getattr(module, name)
    if not isinstance(found, types.FunctionType) or not _may_be_named(module) or found.__module__ != module.__name__:
        raise TypeError(f"not {OWN_FUNCTION}")
    return found


def _as_config(module: types.ModuleType, name: str, fields: dict[str, Any]) -> Any:
    found = getattr(module, name)
    if not (isinstance(found, type) and dataclasses.is_dataclass(found)):
        raise TypeError("not a config class")
    _check_types(found, fields)
    return found(**fields)


def _check_types(kind: type, fields: dict[str, Any]) -> None:
    """Raises TypeError: names the fields whose value is not of the annotated type."""
    hints = typing.get_type_hints(kind)
    wrong = [name for name, value in fields.items() if name in hints and not fits(value, hints[name])]
    if wrong:
        declared = {field.name: field.type for field in dataclasses.fields(kind)}
        given = {name: " ".join(repr(fields[name]).split()) for name in wrong}
        raise TypeError(", ".join(f"{name}={given[name]:.80}, expected {declared.get(name)}" for name in wrong))


def fits(value: Any, hint: Any) -> bool:
    """Returns whether a value that came from JSON is of an annotated type; an int is a float, a bool is no number."""
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
    if origin is Mapping and inner:
        held = isinstance(value, Mapping)
        return held and all(fits(key, inner[0]) and fits(item, inner[1]) for key, item in value.items())
    if origin is Callable:
        return callable(value)
    if hint in (int, float):
        return isinstance(value, (int, float) if hint is float else int) and not isinstance(value, bool)
    if hint is None:
        return value is None
    vague = getattr(hint, "_is_protocol", False) and not getattr(hint, "_is_runtime_protocol", False)
    if isinstance(hint, type) and not vague:
        return isinstance(value, hint)
    return dataclasses.is_dataclass(value)  # a protocol that isinstance cannot check
