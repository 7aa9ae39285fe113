"""What a model costs whatever it runs on: FLOPs by part, and its config with another way to save memory."""

from __future__ import annotations

import dataclasses

from mllm_jax.training.flops import PartFlops
from mllm_jax.training.stage import StageProgram

_ORDER = ("encoder", "projector", "", "llm")  # what data goes through; others stand in the gap


def remat_of(config) -> str:
    """The policy of the LLM, or of the first part that has one; "none" where there is none."""
    if config.llm is not None:
        return config.llm.remat
    parts = filter(dataclasses.is_dataclass, (getattr(config, f.name) for f in dataclasses.fields(config)))
    return next((part.remat for part in parts if "remat" in {f.name for f in dataclasses.fields(part)}), "none")


def model_flops(program: StageProgram) -> dict[str, PartFlops]:
    """FLOPs of a step over all devices, by part: without recomputation, with all of the attention's products.

    A frozen part counts for what it does: its forward pass, and a backward pass where something trained stands before.
    """
    parts = {*program.state.params, *program.frozen}
    return program.flops_by_part(sorted(parts, key=lambda part: (_ORDER.index(part) if part in _ORDER else 2, part)))
