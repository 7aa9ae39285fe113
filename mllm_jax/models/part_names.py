"""Names of parts, and whether two configs describe one part."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from mllm_jax.checkpoints.description import describe
from mllm_jax.checkpoints.differences import differences

# How a part is started and computed; its parameters mean the same whatever these say.
_FREE = ("compute", "mimetic_init")
# What parts were called before they bore their modality.
NEW_NAMES = {
    "encoder": "encoder_image",
    "projector": "projector_image",
    "vision": "encoder_image",
    "text": "encoder_text",
    "text_tower": "encoder_text",
    "contrastive": "heads",
}


def new_names(patterns: Iterable[str]) -> str:
    """What to add to a refusal of parts or patterns, if some of them are old names; else nothing."""
    split = [pattern.partition("/") for pattern in patterns]
    renamed = [f"{NEW_NAMES[part]}{slash}{rest}" for part, slash, rest in split if part in NEW_NAMES]
    return f"; the name is now {', '.join(map(repr, renamed))}" if renamed else ""


def part_differences(one: Any, other: Any) -> list[str]:
    """How two configs differ as far as their parameters are concerned, field by field; empty where they do not."""
    if one == other:
        return []
    return differences(*(_binding(describe(config)) if config is not None else {} for config in (one, other)))


def _binding(described: Any) -> Any:
    """A described config without what is free, in its parts too."""
    if not isinstance(described, dict):
        return described
    return {name: _binding(value) for name, value in described.items() if name not in _FREE}
