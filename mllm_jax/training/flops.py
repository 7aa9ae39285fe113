"""Floating-point operations of a function, counted in its jaxpr with the trip counts of its loops."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Collection
from dataclasses import dataclass

import jax
from jax.extend import core

from mllm_jax.layers.attention import whole_scores


@dataclass(frozen=True)
class PartFlops:
    """FLOPs of one part of a model in a step; a frozen part before all trained ones has no backward pass."""

    forward: int = 0
    backward: int = 0

    @property
    def total(self) -> int:
        return self.forward + self.backward


def count_flops(function, *args) -> int:
    """Counts the multiply-adds (as two operations) of all matrix products and convolutions of `function(*args)`.

    A frozen part counts with its forward pass only: its gradient is not in the program. Elementwise work is left out,
    as is usual for MFU (PaLM, arXiv 2204.02311, B).
    """
    return sum(_count(_traced(function, args), "").values())


def flops_by_part(function, parts: Collection[str], *args) -> dict[str, PartFlops]:
    """Counts the FLOPs of each part of a model, separately for its forward and backward pass.

    Args:
        function: a loss and its gradient.
        parts: names of submodules. The output head of an LLM is "head". All other work is the "objective", which
            includes the head if a loss computes it in chunks.

    Returns:
        the parts with any FLOPs, in the order of `parts`.
    """
    by_stack = _count(_traced(function, args), "")
    sums: Counter[tuple[str, bool]] = Counter()
    for stack, flops in by_stack.items():
        path = [step for step in re.split(r"[/()]+", stack) if step]
        owners = [step.partition(".")[0] for step in path]  # a step is a module, or one of its methods: llm, llm.embed
        found = next((i for i, owner in enumerate(owners) if owner in parts), None)
        part = "objective" if found is None else owners[found]
        if found is not None and any(re.search(r"(\.|^)(attend|lm_head|head)$", step) for step in path[found + 1 :]):
            part = "head"
        sums[part, "transpose(" in stack] += flops
    names = [*parts, "head", "objective"]
    table = {name: PartFlops(sums[name, False], sums[name, True]) for name in dict.fromkeys(names)}
    return {name: flops for name, flops in table.items() if flops.total}


def _traced(function, args):
    """Traces the program with attention by its definition, since loops over blocks skip masked blocks."""
    with whole_scores():
        return jax.make_jaxpr(function)(*args).jaxpr


def _count(jaxpr, stack: str) -> Counter[str]:
    """Counts FLOPs by the name scopes around them."""
    total: Counter[str] = Counter()
    for eqn in jaxpr.eqns:
        name = eqn.primitive.name
        here = f"{stack}/{eqn.source_info.name_stack}"
        if name == "dot_general":
            (contracted, _), _ = eqn.params["dimension_numbers"]
            depth = math.prod(eqn.invars[0].aval.shape[axis] for axis in contracted)
            total[here] += 2 * depth * math.prod(eqn.outvars[0].aval.shape)
        elif name == "conv_general_dilated":
            kernel = eqn.invars[1].aval.shape
            features = kernel[eqn.params["dimension_numbers"].rhs_spec[0]]
            dilation = math.prod(eqn.params["lhs_dilation"])
            total[here] += 2 * math.prod(eqn.outvars[0].aval.shape) * math.prod(kernel) // (features * dilation)
        elif name == "cond":
            branches = [_count(branch.jaxpr, here) for branch in eqn.params["branches"]]
            total += max(branches, key=lambda branch: sum(branch.values()))
        else:
            times = eqn.params["length"] if name == "scan" else 1
            for inner in _inner(eqn.params):
                for where, flops in _count(inner, here).items():
                    total[where] += times * flops
    return total


def _inner(params):
    for value in params.values():
        for item in value if isinstance(value, (list, tuple)) else (value,):
            if isinstance(item, core.ClosedJaxpr):
                yield item.jaxpr
            elif isinstance(item, core.Jaxpr):
                yield item
