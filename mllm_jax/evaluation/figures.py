"""Numbers of the report as text, in the units that their names give."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

from mllm_jax.evaluation.tables import percent


def figure(key: str, value: Any) -> str:
    """Returns a value as text; the end of its name gives its unit, such as `_bytes`, `seconds` or `_per_second`."""
    if isinstance(value, Mapping):
        return " · ".join(f"{words(name)} {figure(name, part)}" for name, part in value.items())
    if isinstance(value, list | tuple):
        return ", ".join(figure(key, part) for part in value)
    if isinstance(value, bool) or not isinstance(value, int | float):
        return {True: "yes", False: "no", None: "–"}.get(value, str(value))
    if not math.isfinite(value):
        return str(value)
    by_name: tuple[tuple[str, Callable[[float], str]], ...] = (
        ("bytes", size),
        ("per_second", short),
        ("seconds", duration),
        ("packing", percent),
        ("mfu", percent),
    )
    for ending, write in by_name:
        if key.lower().endswith(ending):
            return write(value)
    return f"{value:,}" if isinstance(value, int) else f"{value:,.4g}"


def count(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"


def words(key: str) -> str:
    return key.removesuffix("_bytes").replace("_", " ")


def short(value: float) -> str:
    for size, suffix in ((1e12, " T"), (1e9, " G"), (1e6, " M"), (1e3, " k")):
        if abs(value) >= size:
            return f"{value / size:.3g}{suffix}"
    return f"{value:.3g}"


def size(value: float) -> str:
    for size, unit in ((2**40, "TiB"), (2**30, "GiB"), (2**20, "MiB"), (2**10, "KiB")):
        if value >= size:
            return f"{value / size:.1f} {unit}"
    return f"{value:.0f} B"


def duration(seconds: float) -> str:
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, second = divmod(round(seconds), 60)
    hours, minute = divmod(minutes, 60)
    return f"{hours} h {minute:02d} min" if hours else f"{minute} min {second:02d} s"
