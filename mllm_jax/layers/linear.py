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
    """A replacement of x W in every `Linear` that is applied inside `linear_hook`; the bias is added after it.

    A hook may keep leaves beside `kernel`. It reads an existing leaf by `linear.get_variable("params", name)`. It
    declares a leaf that `init` creates as `Linear` does, with the kernel's logical names for the kernel's dimensions:

        rank, inputs = 8, linear.in_ndim
        a = nn.with_logical_partitioning(nn.initializers.normal(0.02), (*linear.names[:inputs], None))
        a = linear.param("lora_a", a, (*kernel.shape[:inputs], rank), jnp.float32)

    `linear.path` identifies the module, such as ("layers", "attention", "q"). A hook that changes nothing there returns
    `product(x)`.
    """

    def __call__(
        self, linear: Linear, x: jax.Array, kernel: jax.Array, product: Callable[[jax.Array], jax.Array]
    ) -> jax.Array:
        """Returns the replacement of x W.

        Args:
            linear: the module that is applied, bound to its parameters.
            x: the module's input, in any dtype.
            kernel: as it is stored.
            product: x -> x W, as computed by the hooks inside this one.

        Returns:
            `linear.dtype`[..., *linear.features]
        """


_hooks: ContextVar[tuple[LinearHook, ...]] = ContextVar("linear_hooks", default=())


@contextmanager
def linear_hook(hook: LinearHook) -> Iterator[None]:
    """Applies a hook to everything that is traced inside; enter it in the function that is compiled.

    The hook entered first is called first, and the others compute its `product`. A hook that replaces the product
    (int8) is therefore entered last, after a hook that adds to it (LoRA).
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
    """Returns a normal initializer with the given deviation, or LeCun's over the first `in_ndim` dimensions."""

    def init(key, shape, dtype):
        scale = std if std is not None else 1.0 / math.sqrt(math.prod(shape[:in_ndim]))
        return scale * jax.random.normal(key, shape, dtype)

    return init


class Linear(nn.Module):
    """A linear map y = x W + b over the last dimensions of x; a `linear_hook` may change it.

    Attributes:
        features: sizes of the new last dimensions, for instance (num_heads, head_dim).
        names: logical names of the kernel's dimensions, inputs first.
        in_ndim: number of last dimensions of x that are contracted.
        init_std: standard deviation of the kernel's initial values; None means 1/sqrt(fan in).
        kernel_init: initializer of the kernel, instead of a normal distribution.
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
        """Looks up int[...] as dtype[..., features]."""
        return with_gathered(
            lambda ids, table: jnp.take(table, ids, axis=0), ids, self.embedding, self.names, self.dtype
        )

    def attend(self, x):
        """Maps dtype[..., features] to logits dtype[..., num_embeddings]."""
        return with_gathered(lambda x, t: x @ t.T, x.astype(self.dtype), self.embedding, self.names, self.dtype)
