"""Names of parts and of the parts inside them, and comparison of two configs of one part."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from mllm_jax.checkpoints.description import describe
from mllm_jax.checkpoints.differences import differences

# Fields for the initialisation and computation of a part; its parameters do not depend on them.
_FREE = ("compute", "mimetic_init")
# Former names of parts, without the modality -> present names.
NEW_NAMES = {
    "encoder": "encoder_image",
    "projector": "projector_image",
    "vision": "encoder_image",
    "text": "encoder_text",
    "text_tower": "encoder_text",
    "contrastive": "heads",
}


def new_names(patterns: Iterable[str]) -> str:
    """Returns a note for error messages if some of the patterns use former names of parts; else an empty string."""
    split = [pattern.partition("/") for pattern in patterns]
    renamed = [f"{NEW_NAMES[part]}{slash}{rest}" for part, slash, rest in split if part in NEW_NAMES]
    return f"; the name is now {', '.join(map(repr, renamed))}" if renamed else ""


def with_inner_parts(parts: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the configs of parts and of the parts inside them, such as generator_image/unet, by name."""
    found = dict(parts)
    for name, part in parts.items():
        found |= {f"{name}/{inner}": config for inner, config in getattr(part, "parts", {}).items()}
    return found


def is_inside(path: str, names: Iterable[str]) -> bool:
    """Returns whether a parameter's path is in one of these parts, or is a name itself."""
    return any(path == name or path.startswith(f"{name}/") for name in names)


def part_differences(one: Any, other: Any) -> list[str]:
    """Returns the differences of two configs that concern their parameters, field by field."""
    if one == other:
        return []
    return differences(*(_binding(describe(config)) if config is not None else {} for config in (one, other)))


def _binding(described: Any) -> Any:
    """Returns a described config without the fields in _FREE, also those of its parts."""
    if not isinstance(described, dict):
        return described
    return {name: _binding(value) for name, value in described.items() if name not in _FREE}
