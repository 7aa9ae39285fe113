"""Linear maps whose parameters carry logical axis names, and the one hook that changes what they compute."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import partial
from typing import Protocol

import jax
import jax.numpy as jnp
from flax import linen as nn

from mllm_jax.sharding.fsdp import with_gathered


class LinearHook(Protocol):
    """Takes the place of x W in every `Linear` that is applied inside `linear_hook`; the bias is added after it.

    A hook may keep leaves beside `kernel`: one that is there is read by `linear.get_variable("params", name)`; one that
    `init` shall create as well is declared as `Linear` declares its own, with the kernel's logical names where it has
    the kernel's dimensions:

        rank, inputs = 8, linear.in_ndim
        a = nn.with_logical_partitioning(nn.initializers.normal(0.02), (*linear.names[:inputs], None))
        a = linear.param("lora_a", a, (*kernel.shape[:inputs], rank), jnp.float32)

    `linear.path` says which one it is, such as ("layers", "attention", "q"): a hook that leaves it alone returns
    `product(x)`.
    """

    def __call__(
        self, linear: Linear, x: jax.Array, kernel: jax.Array, product: Callable[[jax.Array], jax.Array]
    ) -> jax.Array:
        """
        Args:
            linear: the module that is applied, bound to its parameters.
            x: as it was given to the module, in any dtype.
            kernel: as it is stored.
            product: x -> x W, as the hooks inside of this one compute it.

        Returns:
            `linear.dtype`[..., *linear.features]
        """


_hooks: ContextVar[tuple[LinearHook, ...]] = ContextVar("linear_hooks", default=())


@contextmanager
def linear_hook(hook: LinearHook) -> Iterator[None]:
    """Makes a hook effective for what is traced inside; enter it in the function that is compiled.

    Of several the one that was entered first is called first, and the others compute its `product`. A hook that
    replaces the product, as int8 does, is therefore entered last, and one that adds to it, as LoRA does, before.
    """
    token = _hooks.set((*_hooks.get(), hook))
    try:
        yield
    finally:
        _hooks.reset(token)


def contract(x: jax.Array, kernel: jax.Array, in_ndim: int = 1) -> jax.Array:
    """Sums over the last `in_ndim` dimensions of x and the first of the kernel."""
    axes = tuple(range(x.ndim - in_ndim, x.ndim)), tuple(range(in_ndim))
    return jax.lax.dot_general(x, kernel, (axes, ((), ())))


def _kernel_init(in_ndim: int, std: float | None) -> Callable:
    """Normal with the given deviation, or LeCun's over the first `in_ndim` dimensions."""

    def init(key, shape, dtype):
        scale = std if std is not None else 1.0 / math.sqrt(math.prod(shape[:in_ndim]))
        return scale * jax.random.normal(key, shape, dtype)

    return init


class Linear(nn.Module):
    """y = x W + b over the last dimensions of x; see `linear_hook` for what may change it.

    Attributes:
        features: sizes of the new last dimensions, for instance (num_heads, head_dim).
        names: logical names of the kernel's dimensions, inputs first.
        in_ndim: how many last dimensions of x are contracted.
        init_std: deviation of the kernel at the start; None is 1/sqrt(fan in).
        kernel_init: the kernel's initializer, instead of a normal distribution.
    """

    features: tuple[int, ...]
    names: tuple[str, ...]
    in_ndim: int = 1
    use_bias: bool = False
    init_std: float | None = None
    kernel_init: Callable | None = None
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x):
        shape = x.shape[x.ndim - self.in_ndim :] + self.features
        init = self.kernel_init or _kernel_init(self.in_ndim, self.init_std)
        init = nn.with_logical_partitioning(init, self.names)
        kernel = self.param("kernel", init, shape, jnp.float32)
        multiply = partial(contract, in_ndim=self.in_ndim)

        def product(x):
            return with_gathered(multiply, x.astype(self.dtype), kernel, self.names, self.dtype)

        for hook in reversed(_hooks.get()):
            product = partial(hook, self, kernel=kernel, product=product)
        y = product(x)
        if self.use_bias:
            init = nn.with_logical_partitioning(nn.initializers.zeros, self.names[self.in_ndim :])
            y = y + self.param("bias", init, self.features, jnp.float32).astype(self.dtype)
        return y


class Embedding(nn.Module):
    """A table of vectors, looked up by integer, and its transpose as an output head."""

    num_embeddings: int
    features: int
    names: tuple[str, str] = ("vocab", "embed")
    init_std: float = 0.02
    dtype: jnp.dtype = jnp.float32

    def setup(self):
        init = nn.with_logical_partitioning(nn.initializers.normal(self.init_std), self.names)
        self.embedding = self.param("embedding", init, (self.num_embeddings, self.features), jnp.float32)

    def __call__(self, ids):
        """int[...] -> dtype[..., features]"""
        return with_gathered(
            lambda ids, table: jnp.take(table, ids, axis=0), ids, self.embedding, self.names, self.dtype
        )

    def attend(self, x):
        """dtype[..., features] -> dtype[..., num_embeddings]"""
        return with_gathered(lambda x, t: x @ t.T, x.astype(self.dtype), self.embedding, self.names, self.dtype)
