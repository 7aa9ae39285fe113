"""What a model costs whatever it runs on: FLOPs by part, and its config with another way to save memory."""

from __future__ import annotations

import dataclasses

import jax

from mllm_jax.planning.compile import AbstractStep
from mllm_jax.training.config import Experiment
from mllm_jax.training.flops import PartFlops, flops_by_part, with_remat
from mllm_jax.training.partition import join
from mllm_jax.training.step import make_apply

_ORDER = ("encoder", "projector", "", "llm")  # what data goes through; others stand in the gap


def remat_of(config) -> str:
    """The policy of the LLM, or of the first part that has one; "none" where there is none."""
    parts = [getattr(config, "llm", None), *(getattr(config, f.name) for f in dataclasses.fields(config))]
    return next((part.remat for part in parts if hasattr(part, "remat")), "none")


def model_flops(experiment: Experiment, index: int, abstract: AbstractStep) -> dict[str, PartFlops]:
    """FLOPs of a step over all devices, by part: without recomputation, with all of the attention's products.

    A frozen part counts for what it does: its forward pass, and a backward pass where something trained stands before.
    """
    stage = experiment.stages[index]
    apply = make_apply(with_remat(experiment.model, "none").make())

    def loss(params, frozen, batch):
        return stage.objective.loss(apply, join(params, frozen), batch, jax.random.key(0))

    params, frozen = abstract.state.params, abstract.frozen
    parts = sorted({*params, *frozen}, key=lambda part: (_ORDER.index(part) if part in _ORDER else 2, part))
    plain = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), (params, frozen, abstract.batch))
    return flops_by_part(jax.value_and_grad(loss, has_aux=True), parts, *plain)
