"""Int8 weights with a scale for each output channel (symmetric, round to nearest), and the matmul that reads them.

Only storage changes: activations stay as they are. Generation sets `int8_linear` as the hook of `Linear`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax.traverse_util import flatten_dict, unflatten_dict

from mllm_jax.errors import ConfigError
from mllm_jax.layers.linear import Linear, contract, linear_hook

KERNEL, SCALE = "kernel", "kernel_scale"


@dataclass(frozen=True)
class TensorError:
    """The rounding error of one kernel.

    Attributes:
        relative: norm of the error / norm of the kernel.
        bytes_before, bytes_after: its size, with the scales.
    """

    path: str
    relative: float
    bytes_before: int
    bytes_after: int


def quantize(run: Callable[[dict], Any], params: dict) -> tuple[dict, list[TensorError]]:
    """Stores the kernel of every `Linear` that a model applies as int8, with a `kernel_scale` beside it.

    Embeddings (also a tied head), norms, biases and convolutions do not change.

    Args:
        run: applies the model to parameters; it is only traced.

    Returns:
        The parameters, and the error of each kernel.

    Raises:
        ConfigError: there is nothing to quantize, for example if it is quantized already.
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
    """Describes the errors of all kernels in one line."""
    worst = max(errors, key=lambda error: error.relative)
    before, after = (sum(getattr(e, name) for e in errors) for name in ("bytes_before", "bytes_after"))
    return (
        f"int8: {len(errors)} kernels, {before:,} bytes as {after:,}; relative error at most "
        f"{100 * worst.relative:.2f} % ({worst.path})"
    )


def int8_linear(
    linear: Linear, x: jax.Array, kernel: jax.Array, product: Callable[[jax.Array], jax.Array]
) -> jax.Array:
    """Multiplies by an int8 kernel, then scales the result; a hook for `linear_hook`."""
    if kernel.dtype != jnp.int8:
        return product(x)
    x = x.astype(linear.dtype)
    # Adds a zero that depends on x. Without it XLA converts every kernel once, before the loop over tokens, and keeps
    # all as floats; on a CPU it does so even through an optimization barrier.
    kernel = kernel + (x.reshape(-1)[0] > jnp.inf).astype(jnp.int8)
    y = contract(x, kernel.astype(linear.dtype), linear.in_ndim)
    return y * linear.get_variable("params", SCALE).astype(linear.dtype)


def _contracted(run: Callable[[dict], Any], params: dict) -> dict[tuple[str, ...], tuple[int, ...]]:
    """Returns the axes over which each applied `Linear` sums; the axis of a stack's layers counts."""
    found = {}

    def note(linear, x, kernel, product):
        stored = params
        for name in (*linear.path, KERNEL):
            stored = stored[name]
        first = stored.ndim - linear.in_ndim - len(linear.features)
        found[linear.path] = tuple(range(first, first + linear.in_ndim))
        return product(x)

    with linear_hook(note):
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
