"""The differences between two described configs, and which of them make another run."""

from __future__ import annotations

from typing import Any

# Fields that may differ between a run and its continuation: they change the numbers by rounding only. The folders of
# pretrained parts may change because fingerprints detect other weights.
FREE_TO_CHANGE = (
    *("name", "mesh", "part_rules", "cpu_devices", "log_every", "nonfinite", "checkpoint", "evaluation", "pretrained"),
)
# The same for a stage: fields that only measure. A validation's numbers decide which checkpoint is kept as the best.
FREE_IN_A_STAGE = ("validation", "validate_every", "validation_batches")


def differences(old: Any, new: Any, path: str = "") -> list[str]:
    """Returns lines "path: old -> new" for every leaf in which two described configs differ."""
    if isinstance(old, dict) and isinstance(new, dict):
        return [
            line
            for key in sorted(set(old) | set(new))
            for line in differences(old.get(key, "(absent)"), new.get(key, "(absent)"), f"{path}.{key}".lstrip("."))
        ]
    if isinstance(old, list) and isinstance(new, list) and len(old) == len(new):
        return [line for i, pair in enumerate(zip(old, new, strict=True)) for line in differences(*pair, f"{path}.{i}")]
    return [] if old == new else [f"{path}: {old} -> {new}"]


def binding_differences(old: dict, new: dict, begun: int | None = None) -> list[str]:
    """Returns the differences that make a run folder that of another experiment.

    Args:
        begun: number of stages that have begun; later ones may change. None means all.
    """
    return differences(_binding(old, begun), _binding(new, begun))


def _binding(described: dict, begun: int | None) -> dict:
    kept = {key: value for key, value in described.items() if key not in FREE_TO_CHANGE}
    if isinstance(stages := kept.get("stages"), list) and all(isinstance(stage, dict) for stage in stages):
        kept["stages"] = [{k: v for k, v in stage.items() if k not in FREE_IN_A_STAGE} for stage in stages[:begun]]
    if isinstance(tokenizer := kept.get("tokenizer"), dict):
        # The run has a copy of the files that it read there.
        kept["tokenizer"] = {key: value for key, value in tokenizer.items() if key != "folder"}
    return kept
