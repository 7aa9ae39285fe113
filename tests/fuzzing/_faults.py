"""Faults for bytes, text and JSON, shared by several kinds of bad input."""

from __future__ import annotations

import copy
import random
from collections.abc import Iterator
from typing import Any

TEXTS = ("", "\ud800", "a\0b", "é🦊", "\n", "<image>", "../x", "/dev/zero", "x" * 5_000, "{{ 1/0 }}", "true", "7", "-1")
NUMBERS = (0, -1, 1, 2, 3, 7, 224, 65_537, 10**9, 2**63, 10**400, 0.5, -0.0, 1e308, float("nan"), float("inf"))


def deep(levels: int = 400) -> list:
    """Returns nested lists."""
    value: list = []
    for _ in range(levels):
        value = [value]
    return value


def leaf(rng: random.Random) -> Any:
    """Returns an unexpected value."""
    return rng.choice([None, True, False, [], {}, [[]], [{}], {"a": 1}, [1, 2, 3], deep(), *NUMBERS, *TEXTS])


def values(rng: random.Random, value: Any) -> Any:
    """Returns JSON with one to three faults."""
    value = copy.deepcopy(value)
    for _ in range(rng.choice((1, 1, 2, 3))):
        places = list(_places(value))
        where, key = rng.choice(places) if places else ([value], 0)
        how = rng.randrange(6)
        if how == 0:
            del where[key]
        elif how == 1 and places:
            other, second = rng.choice(places)
            where[key] = copy.deepcopy(other[second]) if second in _keys(other) else leaf(rng)
        elif how == 2:
            where[key] = [where[key]] * rng.choice((1, 2, 9))
        else:
            where[key] = leaf(rng)
    return value


def data(rng: random.Random, content: bytes) -> bytes:
    """Returns bytes with one to six faults."""
    content = bytearray(content)
    for _ in range(rng.choice((1, 1, 2, 4, 6))):
        if not content:
            return bytes(content)
        at = rng.randrange(len(content))
        stop = min(len(content), at + rng.choice((1, 2, 4, 16, 200)))
        how = rng.randrange(6)
        if how == 0:
            content[at] ^= 1 << rng.randrange(8)
        elif how == 1:
            content[at:stop] = rng.randbytes(stop - at)
        elif how == 2:
            del content[at:stop]
        elif how == 3:
            content[at:at] = content[at:stop] * rng.choice((1, 2, 30))
        elif how == 4:
            content[at:stop] = rng.choice((b"\0", b"\xff")) * (stop - at)
        else:
            del content[at:]
    return bytes(content)


def _places(value: Any, levels: int = 6) -> Iterator[tuple[Any, Any]]:
    """Yields every (container, key) down to some depth."""
    for key in _keys(value):
        yield value, key
        if levels:
            yield from _places(value[key], levels - 1)


def _keys(value: Any) -> list:
    return list(value) if isinstance(value, dict) else list(range(len(value))) if isinstance(value, list) else []
