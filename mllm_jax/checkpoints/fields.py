"""Fields of a part's config by name, at its top level or in its dialect.

Options of checkpoints say fields of both kinds, and no name is in both places.
"""

from __future__ import annotations

import dataclasses
from typing import Any, TypeVar

Config = TypeVar("Config")

DIALECT = "dialect"


def make_config(kind: type[Config], **values: Any) -> Config:
    """Makes a config of this class; values that are none of its own fields go into its dialect.

    Raises:
        TypeError: a name that neither has.
    """
    return kind(**_nested(kind, values))


def change_fields(config: Config, **changes: Any) -> Config:
    """Returns the config with other values; names that are none of its own fields are those of its dialect.

    Raises:
        TypeError: a name that neither has.
    """
    return dataclasses.replace(config, **_nested(config, changes))


def field_values(config: Any) -> dict[str, Any]:
    """Returns all fields by name, those of the dialect after the others."""
    values = {field.name: getattr(config, field.name) for field in dataclasses.fields(config)}
    dialect = values.pop(DIALECT, None)
    return values if dialect is None else values | field_values(dialect)


def field_value(config: Any, name: str, default: Any = None) -> Any:
    """Returns the value of a field, or the default where the config has no such field."""
    return getattr(config, name, getattr(getattr(config, DIALECT, None), name, default))


def field_path(config: Any, name: str) -> str:
    """Returns where a config has a field: "hidden_size", "dialect.norm"."""
    return f"{DIALECT}.{name}" if hasattr(getattr(config, DIALECT, None), name) else name


def _nested(config: Any, values: dict[str, Any]) -> dict[str, Any]:
    """Returns the values with those of the dialect inside one; of a class, its default is what they change."""
    own = {field.name for field in dataclasses.fields(config)}
    inner = {name: value for name, value in values.items() if name not in own}
    if not inner or DIALECT not in own:
        return values
    dialect = values.get(DIALECT, getattr(config, DIALECT))
    return {name: value for name, value in values.items() if name in own} | {
        DIALECT: dataclasses.replace(dialect, **inner)
    }
