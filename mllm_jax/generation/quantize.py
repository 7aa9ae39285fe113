"""Weights as int8 with a scale for each output channel (symmetric, round to nearest), and the matmul that reads them.

Storage only: activations stay as they are. The layers know nothing of it; generation puts `int8_linear` in the place
of their `Linear`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax.traverse_util import flatten_dict, unflatten_dict

from mllm_jax.errors import ConfigError
from mllm_jax.layers.linear import Linear

KERNEL, SCALE = "kernel", "kernel_scale"


@dataclass(frozen=True)
class TensorError:
    """What rounding did to one kernel.

    Attributes:
        relative: norm of the error / norm of the kernel.
        bytes_before, bytes_after: the scales counted in.
    """

    path: str
    relative: float
    bytes_before: int
    bytes_after: int


def quantize(run: Callable[[dict], Any], params: dict) -> tuple[dict, list[TensorError]]:
    """The kernel of every `Linear` that a model applies as int8, with a `kernel_scale` beside it.

    Embeddings (a tied head too), norms, biases and convolutions stay.

    Args:
        run: what applies the model to parameters; it is traced, not computed.

    Returns:
        The parameters, and the error of each kernel.

    Raises:
        ConfigError: there is nothing to quantize, as when it has been done already.
    """
    flat = flatten_dict(params)
    errors = []
    for path, axes in sorted(_contracted(run, params).items()):
        kernel = flat[*path, KERNEL]
        if kernel.dtype == jnp.int8:
            continue
        flat[*path, KERNEL], scale, relative = _round(jnp.asarray(kernel), axes=axes)
        flat[*path, SCALE] = scale
        after = kernel.size + scale.nbytes
        errors.append(TensorError("/".join(path), float(relative), kernel.size * kernel.dtype.itemsize, after))
    if not errors:
        raise ConfigError("int8 storage of a model without floating-point kernels", "one with them", "quantize it once")
    return unflatten_dict(flat), errors


def summary(errors: list[TensorError]) -> str:
    """One line about all kernels."""
    worst = max(errors, key=lambda error: error.relative)
    before, after = (sum(getattr(e, name) for e in errors) for name in ("bytes_before", "bytes_after"))
    return (
        f"int8: {len(errors)} kernels, {before:,} bytes as {after:,}; relative error at most "
        f"{100 * worst.relative:.2f} % ({worst.path})"
    )


def int8_linear(next_call: Callable, args: tuple, kwargs: dict, context) -> Any:
    """For `nn.intercept_methods`: a `Linear` whose kernel is int8 multiplies by it, then scales the result."""
    module = context.module
    if not isinstance(module, Linear) or context.method_name != "__call__":
        return next_call(*args, **kwargs)
    kernel = module.get_variable("params", KERNEL)
    if kernel is None or kernel.dtype != jnp.int8:
        return next_call(*args, **kwargs)
    x = args[0].astype(module.dtype)
    # Nothing is larger than infinity: a zero that hangs on x. Without it XLA converts every kernel once, before the
    # loop over tokens, and keeps them all as floats; on a CPU it does so through an optimization barrier.
    kernel = kernel + (x.reshape(-1)[0] > jnp.inf).astype(jnp.int8)
    axes = tuple(range(x.ndim - module.in_ndim, x.ndim)), tuple(range(module.in_ndim))
    y = jax.lax.dot_general(x, kernel.astype(module.dtype), (axes, ((), ())))
    y = y * module.get_variable("params", SCALE).astype(module.dtype)
    return y + module.get_variable("params", "bias").astype(module.dtype) if module.use_bias else y


def _contracted(run: Callable[[dict], Any], params: dict) -> dict[tuple[str, ...], tuple[int, ...]]:
    """The axes over which each `Linear` that is applied sums, a stack's axis of layers counted."""
    found = {}

    def note(next_call, args, kwargs, context):
        module = context.module
        if isinstance(module, Linear) and context.method_name == "__call__":
            kernel = params
            for name in (*module.path, KERNEL):
                kernel = kernel[name]
            first = kernel.ndim - module.in_ndim - len(module.features)
            found[module.path] = tuple(range(first, first + module.in_ndim))
        return next_call(*args, **kwargs)

    with nn.intercept_methods(note):
        jax.eval_shape(run, params)
    return found


@partial(jax.jit, static_argnames="axes")
def _round(kernel: jax.Array, *, axes: tuple[int, ...]) -> tuple[jax.Array, jax.Array, jax.Array]:
    kernel = kernel.astype(jnp.float32)
    largest = jnp.abs(kernel).max(axis=axes, keepdims=True)
    scale = jnp.where(largest > 0, largest, 1.0) / 127
    rounded = jnp.round(kernel / scale).astype(jnp.int8)
    relative = jnp.linalg.norm(rounded * scale - kernel) / jnp.linalg.norm(kernel)
    return rounded, scale.squeeze(axes), relative
