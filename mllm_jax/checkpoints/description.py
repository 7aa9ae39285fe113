"""Configs as JSON and back."""

from __future__ import annotations

import dataclasses
import importlib
from typing import Any

from mllm_jax.errors import ConfigError


def describe(value: Any) -> Any:
    """A config as JSON: a dataclass becomes an object with its class under "class".

    Raises:
        ConfigError: a value that is neither a dataclass nor plain data.
    """
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = {f.name: describe(getattr(value, f.name)) for f in dataclasses.fields(value) if f.init}
        return {"class": f"{type(value).__module__}:{type(value).__qualname__}", **fields}
    if isinstance(value, (list, tuple)):
        return [describe(v) for v in value]
    if isinstance(value, (str, int, float, bool)) or value is None:
        return value
    raise ConfigError(f"a config value {value!r}", "dataclasses, tuples, strings, numbers", "replace it by plain data")


def rebuild(description: Any) -> Any:
    """The reverse of `describe`; only classes of this package are imported.

    Raises:
        ConfigError: a class that does not exist (any more), or fields it does not know.
    """
    if isinstance(description, list):
        return tuple(rebuild(v) for v in description)
    if not isinstance(description, dict):
        return description
    kind = description.get("class", "")
    module, _, name = kind.partition(":")
    fields = {k: rebuild(v) for k, v in description.items() if k != "class"}
    if module.split(".")[0] != "mllm_jax":
        raise ConfigError(f"a stored config of class {kind!r}", "a class of mllm_jax", "build the experiment in Python")
    try:
        found = getattr(importlib.import_module(module), name)
        if not (isinstance(found, type) and dataclasses.is_dataclass(found)):
            raise TypeError("not a config class")
        return found(**fields)
    except (ImportError, AttributeError, TypeError) as error:
        raise ConfigError(
            f"a stored {kind}: {error}", "what this version knows", "use the version that wrote it"
        ) from error
