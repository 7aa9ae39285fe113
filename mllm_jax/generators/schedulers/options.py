"""Declarations of a scheduler's options, as fields of a dataclass with the values that they take."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import field
from typing import Any

from mllm_jax.checkpoints.config_options import is_number, is_whole

LARGEST = 1 << 20  # limit of timesteps


def option(default: Any, fits: Callable[[Any], bool], expected: str, ours: bool = False) -> Any:
    """Declares an option of a dataclass, with the values that it takes; `ours` if diffusers' class does not have it."""
    return field(default=default, metadata={"fits": fits, "expected": expected, "ours": ours})


def flag(default: bool) -> Any:
    """Declares an option that is true or false."""
    return option(default, lambda value: isinstance(value, bool), "true or false")


def whole(default: int, least: int = 0, most: int = LARGEST) -> Any:
    """Declares an option that is an integer."""
    return option(
        default, lambda value: is_whole(value) and least <= value <= most, f"a whole number, {least} to {most:,}"
    )


def number(default: float | None, above: float = -1e30, most: float = 1e30) -> Any:
    """Declares an option that is a number; None as the default allows None."""
    return option(
        default,
        lambda value: (value is None and default is None) or (is_number(value) and above < value <= most),
        f"a number above {above:g}, at most {most:g}",
    )


def choice(*allowed: Any, ours: bool = False) -> Any:
    """Declares an option that has one of some values, of which the first is the default."""
    kinds = [(type(each), each) for each in allowed]
    listed = " or ".join(map(repr, allowed))
    return option(allowed[0], lambda value: (type(value), value) in kinds, f"{listed}; nothing else is supported", ours)
