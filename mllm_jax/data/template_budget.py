"""Limits of a chat template: the characters and list items that it makes, and the thread's time.

Every step counts one, every new value its length. Operations that would make a large value are counted before they run.
"""

from __future__ import annotations

import re
import time
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from jinja2 import TemplateRuntimeError

# Characters and list items that a template may make: a constant, and for each character of the conversation. Templates
# in use make each message about five times (trimmed, split, joined, written).
MAX_MADE, MADE_A_CHARACTER = 4_000_000, 32
# Characters of the rendered text, which is then encoded.
MAX_TEXT, TEXT_A_CHARACTER = 500_000, 8
# Of the thread's own time; a busy machine takes a few times longer. A template in use takes milliseconds.
MAX_SECONDS, SECONDS_A_CHARACTER = 2.0, 1e-6
_MAX_BITS = 4096  # of an integer
_MAX_WIDTH = 999  # of a formatted field
_CHECKED_EVERY = 64
_PERCENT = re.compile(r"%(?:\([^)]*\))?[#0\- +]*(\*|\d*)(?:\.(\*|\d*))?")


class BudgetError(TemplateRuntimeError):
    """A template exceeds its budget."""


class Budget:
    """The rest of one rendering's budget, and the sizes of the lists and mappings seen."""

    def __init__(self, given: Any):
        self._sizes: dict[int, tuple[Any, int]] = {}
        self.most = self._left = float("inf")
        size = self.size(given)
        self.most = self._left = MAX_MADE + MADE_A_CHARACTER * size
        self._text = MAX_TEXT + TEXT_A_CHARACTER * size
        self._seconds, self._steps = MAX_SECONDS + SECONDS_A_CHARACTER * size, 0
        self._end = time.thread_time() + self._seconds

    def spend(self, amount: int = 0) -> None:
        """Counts one step, and `amount` characters or items that it makes."""
        self._left -= 1 + amount
        self._steps += 1
        if self._left < 0:
            raise BudgetError(f"the template makes more than {self.most:,} characters and list items")
        if (amount > 10_000 or self._steps % _CHECKED_EVERY == 0) and time.thread_time() > self._end:
            raise BudgetError(f"the template takes more than {self._seconds:g} seconds")

    def size(self, value: Any) -> int:
        """Returns the characters and items of a value at every depth; repeated values count each time."""
        if isinstance(value, (str, bytes)):
            return 1 + len(value)
        if not isinstance(value, (list, tuple, dict)):
            return 1
        known = self._sizes.get(id(value))
        if known is None:
            total = 1
            for part in (*value.keys(), *value.values()) if isinstance(value, dict) else value:
                total += self.size(part)
                if total > self.most:
                    raise BudgetError(f"the template makes a value of more than {self.most:,} characters and items")
            known = self._sizes[id(value)] = (value, total)  # keeps the value, so that no other value gets its id
        return known[1]

    def made(self, value: Any) -> Any:
        """Counts a new value, and returns it."""
        if isinstance(value, (str, bytes)):
            self.spend(len(value))
        elif isinstance(value, (list, tuple, dict)):
            self.spend(len(value))
            self.size(value)
        elif isinstance(value, int) and value.bit_length() > _MAX_BITS:
            raise BudgetError(f"the template makes an integer of {value.bit_length():,} bits")
        return value

    def written(self, text: str) -> str:
        """Returns the rendered text if it is not too long."""
        if len(text) > self._text:
            raise BudgetError(f"the template writes {len(text):,} characters, more than {self._text:,}")
        return text

    def text(self, value: Any) -> None:
        """Counts a value that is about to be written out."""
        if not isinstance(value, str):
            self.spend(self.size(value) if not _is_view(value) else sum(map(self.size, _flat(value))))


def _is_view(value: Any) -> bool:
    return isinstance(value, (type({}.keys()), type({}.values()), type({}.items())))


def _flat(view: Iterable) -> Iterator[Any]:
    for part in view:
        yield from part if isinstance(part, tuple) else (part,)


# ---- operations that may make large values


def before_operator(budget: Budget, operator: str, left: Any, right: Any) -> None:
    if operator == "*":
        for whole, count in ((left, right), (right, left)):
            if isinstance(whole, (str, bytes, list, tuple)) and isinstance(count, int):
                budget.spend(budget.size(whole) * max(count, 0))
    elif operator == "**" and isinstance(left, int) and isinstance(right, int):
        if left.bit_length() * max(right, 0) > 2 * _MAX_BITS:
            raise BudgetError(f"the template makes an integer of about {left.bit_length() * right:,} bits")
    elif operator == "%" and isinstance(left, (str, bytes)):
        _before_percent(budget, left, right)


def _before_percent(budget: Budget, text: str | bytes, values: Any) -> None:
    text = text.decode("latin-1") if isinstance(text, bytes) else text
    for width in (width for found in _PERCENT.finditer(text) for width in found.groups()):
        require_width(width or "0")
    budget.spend(len(text) + text.count("%") * (_MAX_WIDTH + budget.size(values)))


def require_width(width: str) -> None:
    if width == "*" or len(width) > 3:
        raise BudgetError(f"the template formats to a width of {width[:20]}, more than {_MAX_WIDTH}")


def before_method(budget: Budget, owner: Any, name: str, args: tuple, kwargs: Mapping[str, Any]) -> None:
    """Counts the result of a method of text, bytes or a number; other methods make about as much as they get."""
    given = (*args, *kwargs.values())
    if name in ("ljust", "rjust", "center", "zfill", "to_bytes", "expandtabs"):
        widths = [value for value in given if isinstance(value, int)]
        budget.spend(max([0, *widths]) * (len(owner) if name == "expandtabs" else 1))
    elif name in ("strip", "lstrip", "rstrip"):
        _require_few(given)
    elif name == "replace" and len(args) > 1:
        _before_replace(budget, owner, *args[:2])
    elif name == "translate" and args and isinstance(args[0], dict):
        longest = max((len(value) for value in args[0].values() if isinstance(value, str)), default=1)
        budget.spend(len(owner) * longest)


def _before_replace(budget: Budget, text: Any, old: Any, new: Any) -> None:
    if type(text) is type(old) is type(new) or isinstance(text, str) and isinstance(old, str) and isinstance(new, str):
        budget.spend(len(text) + text.count(old) * len(new))


def _require_few(characters: Iterable[Any]) -> None:
    """Limits the characters to strip: each is compared at each position."""
    for given in characters:
        if isinstance(given, (str, bytes)) and len(given) > 1_000:
            raise BudgetError(f"the template strips {len(given):,} different characters")


def before_filter(budget: Budget, name: str, value: Any, args: tuple, kwargs: Mapping[str, Any]) -> None:
    given = (*args, *kwargs.values())
    largest = max((abs(number) for number in given if isinstance(number, int)), default=0)
    text = value if isinstance(value, str) else ""
    if name in ("center", "batch", "slice"):
        budget.spend(largest)
    elif name in ("indent", "tojson"):
        longest = max([largest, *(len(each) for each in given if isinstance(each, str))])
        budget.spend((1 + longest) * (budget.size(value) if name == "tojson" else 1 + len(text.splitlines())))
        if name == "tojson":
            require_width(str(longest))
    elif name == "round" and largest > 100:
        raise BudgetError(f"the template rounds to {largest:,} digits")
    elif name == "trim":
        _require_few(given)
    elif name == "replace" and len(args) > 1:
        _before_replace(budget, str(value) if isinstance(value, (int, float)) else value, *map(str, args[:2]))
    elif name == "format":
        _before_percent(budget, text, list(given))
    elif name == "sum" and any(isinstance(start, (list, tuple)) for start in given):
        budget.spend(len(value) * budget.size(value) if isinstance(value, (list, tuple)) else budget.most)


def before_join(budget: Budget, values: Any, between: str | bytes) -> list:
    """Returns the values as a list, counted with the separators."""
    listed = []
    for value in values:
        budget.text(value)
        budget.spend(len(between) + (len(value) if isinstance(value, (str, bytes)) else 0))
        listed.append(value)
    return listed
