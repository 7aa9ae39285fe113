"""Linear maps whose parameters carry logical axis names."""

from __future__ import annotations

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import linen as nn

from mllm_jax.sharding.fsdp import with_gathered


def _kernel_init(in_ndim: int, std: float | None) -> Callable:
    """Normal with the given deviation, or LeCun's over the first `in_ndim` dimensions."""

    def init(key, shape, dtype):
        scale = std if std is not None else 1.0 / math.sqrt(math.prod(shape[:in_ndim]))
        return scale * jax.random.normal(key, shape, dtype)

    return init


class Linear(nn.Module):
    """y = x W + b over the last dimensions of x.

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
        axes = tuple(range(x.ndim - self.in_ndim, x.ndim)), tuple(range(self.in_ndim))

        def product(x, kernel):
            return jax.lax.dot_general(x, kernel, (axes, ((), ())))

        y = with_gathered(product, x.astype(self.dtype), kernel, self.names, self.dtype)
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
