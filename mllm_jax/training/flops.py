"""Floating-point operations of a function, counted in its jaxpr with the trip counts of its loops."""

from __future__ import annotations

import math

import jax
from jax.extend import core


def count_flops(function, *args) -> int:
    """Multiply-adds (as two operations) of all matrix products and convolutions that `function(*args)` performs.

    What is in the program is counted, every part of a model alike; a frozen part counts its forward pass only, as no
    gradient of it is in the program. Elementwise work is left out, as is usual for MFU (PaLM, arXiv 2204.02311, B).
    """
    return _count(jax.make_jaxpr(function)(*args).jaxpr)


def _count(jaxpr) -> int:
    total = 0
    for eqn in jaxpr.eqns:
        name = eqn.primitive.name
        if name == "dot_general":
            (contracted, _), _ = eqn.params["dimension_numbers"]
            depth = math.prod(eqn.invars[0].aval.shape[axis] for axis in contracted)
            total += 2 * depth * math.prod(eqn.outvars[0].aval.shape)
        elif name == "conv_general_dilated":
            kernel = eqn.invars[1].aval.shape
            features = kernel[eqn.params["dimension_numbers"].rhs_spec[0]]
            dilation = math.prod(eqn.params["lhs_dilation"])
            total += 2 * math.prod(eqn.outvars[0].aval.shape) * math.prod(kernel) // (features * dilation)
        elif name == "cond":
            total += max(_count(branch.jaxpr) for branch in eqn.params["branches"])
        else:
            times = eqn.params["length"] if name == "scan" else 1
            total += times * sum(_count(inner) for inner in _inner(eqn.params))
    return total


def _inner(params):
    for value in params.values():
        for item in value if isinstance(value, (list, tuple)) else (value,):
            if isinstance(item, core.ClosedJaxpr):
                yield item.jaxpr
            elif isinstance(item, core.Jaxpr):
                yield item
