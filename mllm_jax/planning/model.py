"""What a model costs whatever it runs on: FLOPs by part, and its config with another way to save memory."""

from __future__ import annotations

import dataclasses

from mllm_jax.training.flops import PartFlops
from mllm_jax.training.stage import StageProgram

_ORDER = ("encoder", "projector", "", "llm")  # kinds of parts as data goes through; others stand in the gap


def remat_of(config) -> str:
    """The policy of the LLM, or of the first part that has one; "none" where there is none."""
    parts = [*filter(None, [config.llm]), *config.parts.values()]
    return next((part.remat for part in parts if "remat" in {f.name for f in dataclasses.fields(part)}), "none")


def model_flops(program: StageProgram) -> dict[str, PartFlops]:
    """FLOPs of a step over all devices, by part: without recomputation, with all of the attention's products.

    A frozen part counts for what it does: its forward pass, and a backward pass where something trained stands before.
    """
    parts = {part: part.partition("_")[0] for part in {*program.state.params, *program.frozen}}
    order = {part: (_ORDER.index(kind) if kind in _ORDER else 2, part) for part, kind in parts.items()}
    return program.flops_by_part(sorted(order, key=order.__getitem__))
