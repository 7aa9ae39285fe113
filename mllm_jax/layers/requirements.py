"""Checks of a model config's sizes and switches, with errors in one form."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from mllm_jax.errors import ConfigError


class Requirements:
    """The checks of a config's `__post_init__`.

    Args:
        what: name of the model in messages.
        config: the dataclass whose fields are checked.
    """

    def __init__(self, what: str, config: Any):
        self._what, self._config = what, config

    def __call__(self, condition: Any, given: str, expected: str, todo: str) -> None:
        """Raises ConfigError, with its three parts, unless the condition holds."""
        if not condition:
            raise ConfigError(f"{self._what}: {given}", expected, todo)

    def one_of(self, name: str, allowed: Iterable[Any]) -> None:
        """Raises ConfigError if the field `name` has none of the allowed values."""
        given, allowed = getattr(self._config, name), tuple(allowed)
        self(given in allowed, f"{name} {given!r}", f"one of {', '.join(map(str, allowed))}", f"change {name}")

    def kv_heads(self, heads: int, kv_heads: int) -> None:
        """Raises ConfigError unless the key-value heads divide the heads."""
        self(
            heads > 0 and heads % kv_heads == 0,
            f"{heads} heads, {kv_heads} key-value heads",
            "a number of heads that the key-value heads divide",
            "change num_heads or num_kv_heads",
        )

    def heads(self, multiple: int = 1, why: str = "") -> None:
        """Raises ConfigError unless the heads divide hidden_size into sizes that are a multiple of `multiple`."""
        width, heads = self._config.hidden_size, self._config.num_heads
        self(
            width % (multiple * heads) == 0,
            f"hidden_size {width} for {heads} heads",
            f"heads whose size is a multiple of {multiple}: {why}" if why else "heads that divide it",
            "change hidden_size or num_heads",
        )
