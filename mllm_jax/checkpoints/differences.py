"""The differences between two described configs, and which of them make another run."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

# Fields that may differ between a run and its continuation: none of them changes what was trained already. The folders
# of pretrained parts may change because fingerprints detect other weights.
FREE_TO_CHANGE = (
    *("name", "mesh", "part_rules", "cpu_devices", "log_every", "nonfinite", "checkpoint", "evaluation", "pretrained"),
)
# The same for a stage: fields that only measure. A validation's numbers decide which checkpoint is kept as the best.
FREE_IN_A_STAGE = (
    *("validation", "validate_every", "validation_batches"),
    *("evaluate_every", "evaluate", "evaluate_limit"),
)
# The same for the last stage that has begun: fields that only its steps still to come depend on.
OPEN_IN_A_STAGE = ("steps", "optimizer", "accumulate", "patience", "frozen_dtype", "data.rows")
# How a model is computed, at any depth of the model's config.
COMPUTE = ("compute", "dtype", "remat", "scan_unroll")
# Fields that change no number of the training.
UNRECORDED = ("name", "cpu_devices", "log_every", "checkpoint", "evaluation", "pretrained", "tokenizer")


@dataclass(frozen=True)
class Difference:
    """A leaf in which two described configs differ; one that a config lacks is "(absent)" there."""

    field: str
    old: Any
    new: Any

    def __str__(self) -> str:
        return f"{self.field}: {self.old} -> {self.new}"


def differences(old: Any, new: Any) -> list[str]:
    """Returns lines "path: old -> new" for every leaf in which two described configs differ."""
    return [str(found) for found in _differing(old, new)]


def binding_differences(old: dict, new: dict, begun: int | None = None) -> list[str]:
    """Returns the differences that make a run folder that of another experiment.

    Args:
        begun: number of stages that have begun. Later ones may change, and of the last one fields that only its steps
            still to come depend on. None: nothing of a stage may change.
    """
    return [str(found) for found in _of_begun(old, new, begun) if not _may_change(found.field.split("."), begun)]


def recorded_differences(old: dict, new: dict, begun: int) -> list[Difference]:
    """Finds what changed of a run that goes on: what its steps still to come depend on, and how they are judged."""
    found = _of_begun(old, new, begun)
    return [one for one in found if one.field.partition(".")[0] not in UNRECORDED]


def _of_begun(old: dict, new: dict, begun: int | None) -> list[Difference]:
    def cut(described: dict) -> dict:
        stages = described.get("stages")
        return described | {"stages": stages[:begun]} if isinstance(stages, list) else described

    return _differing(cut(old), cut(new))


def _may_change(path: list[str], begun: int | None) -> bool:
    match path:
        case [top, *_] if top in FREE_TO_CHANGE or path == ["tokenizer", "folder"]:  # the run holds a copy of the words
            return True
        case ["compute", *_]:
            return True
        case ["model", *rest] | ["stages", _, "model", *rest]:
            return "compute" in rest or rest[-1:] in ([name] for name in COMPUTE)
        case ["stages", number, field, *rest]:
            last = begun is not None and int(number) == begun - 1
            names = (field, ".".join([field, *rest[:1]]))
            return field in FREE_IN_A_STAGE or (last and any(name in OPEN_IN_A_STAGE for name in names))
        case _:
            return False


def _differing(old: Any, new: Any, path: str = "") -> list[Difference]:
    if isinstance(old, dict) and isinstance(new, dict):
        return [
            found
            for key in sorted(set(old) | set(new))
            for found in _differing(old.get(key, "(absent)"), new.get(key, "(absent)"), f"{path}.{key}".lstrip("."))
        ]
    if isinstance(old, list) and isinstance(new, list) and len(old) == len(new):
        return [
            found for i, pair in enumerate(zip(old, new, strict=True)) for found in _differing(*pair, f"{path}.{i}")
        ]
    return [] if old == new else [Difference(path, old, new)]
