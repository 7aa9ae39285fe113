"""Splits into clips that train and clips that are held out, by a hash that every machine agrees on."""

from __future__ import annotations

import hashlib

from mllm_jax.errors import ConfigError

SPLITS = ("train", "held_out")


def check_split(data_set: str, split: str) -> None:
    """Raises ConfigError: no such split."""
    if split not in SPLITS:
        raise ConfigError(f"{data_set}: split {split!r}", f"one of {', '.join(SPLITS)}", "correct it")


def stable_hash(key: str) -> int:
    """Returns an integer in [0, 2**64) that is the same in every process, unlike Python's own hash."""
    return int.from_bytes(hashlib.sha256(key.encode()).digest()[:8], "big")
