"""What differs between two described configs, and which of it makes a run another one."""

from __future__ import annotations

from typing import Any

# What may differ between a run and its continuation: none of it changes the numbers beyond rounding. Pretrained parts
# may move because fingerprints tell if they change.
FREE_TO_CHANGE = (
    *("name", "mesh", "part_rules", "cpu_devices", "log_every", "nonfinite", "checkpoint", "evaluation", "pretrained"),
)


def differences(old: Any, new: Any, path: str = "") -> list[str]:
    """Lines "path: old -> new" for every leaf in which two described configs differ."""
    if isinstance(old, dict) and isinstance(new, dict):
        return [
            line
            for key in sorted(set(old) | set(new))
            for line in differences(old.get(key, "(absent)"), new.get(key, "(absent)"), f"{path}.{key}".lstrip("."))
        ]
    if isinstance(old, list) and isinstance(new, list) and len(old) == len(new):
        return [line for i, pair in enumerate(zip(old, new, strict=True)) for line in differences(*pair, f"{path}.{i}")]
    return [] if old == new else [f"{path}: {old} -> {new}"]


def binding_differences(old: dict, new: dict) -> list[str]:
    """The differences that make a run folder another experiment's."""
    return differences(_binding(old), _binding(new))


def _binding(described: dict) -> dict:
    kept = {key: value for key, value in described.items() if key not in FREE_TO_CHANGE}
    if isinstance(tokenizer := kept.get("tokenizer"), dict):
        # The run holds a copy of what it read there.
        kept["tokenizer"] = {key: value for key, value in tokenizer.items() if key != "folder"}
    return kept
