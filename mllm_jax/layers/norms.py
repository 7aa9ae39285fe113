"""RMSNorm, LayerNorm and unit vectors, computed in float32."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import linen as nn


class RMSNorm(nn.Module):
    """The norm x / rms(x) * scale over the last dimension (arXiv 1910.07467).

    Attributes:
        axis: logical name of that dimension.
        init_scale: initial value of the scale.
    """

    eps: float = 1e-6
    dtype: jnp.dtype = jnp.float32
    axis: str = "embed"
    init_scale: float = 1.0

    @nn.compact
    def __call__(self, x):
        init = nn.with_logical_partitioning(nn.initializers.constant(self.init_scale), (self.axis,))
        scale = self.param("scale", init, (x.shape[-1],), jnp.float32)
        x = x.astype(jnp.float32)
        x = x * jax.lax.rsqrt(jnp.mean(jnp.square(x), axis=-1, keepdims=True) + self.eps)
        return (x * scale).astype(self.dtype)


class LayerNorm(nn.Module):
    """The norm (x - mean) / std * scale + bias over the last dimension (arXiv 1607.06450).

    Attributes:
        affine: whether there are a scale and a bias.
        axis: logical name of that dimension.
    """

    eps: float = 1e-6
    dtype: jnp.dtype = jnp.float32
    affine: bool = True
    axis: str = "embed"

    @nn.compact
    def __call__(self, x):
        x = x.astype(jnp.float32)
        x = x - jnp.mean(x, axis=-1, keepdims=True)
        x = x * jax.lax.rsqrt(jnp.mean(jnp.square(x), axis=-1, keepdims=True) + self.eps)
        if self.affine:
            shape = (x.shape[-1],)
            scale = self.param("scale", nn.with_logical_partitioning(nn.initializers.ones, (self.axis,)), shape)
            bias = self.param("bias", nn.with_logical_partitioning(nn.initializers.zeros, (self.axis,)), shape)
            x = x * scale + bias
        return x.astype(self.dtype)


def as_unit_vectors(x: jax.Array) -> jax.Array:
    """Scales dtype[..., E] to float32[..., E] of length 1; zeros stay zeros."""
    x = x.astype(jnp.float32)
    return x * jax.lax.rsqrt(jnp.sum(jnp.square(x), axis=-1, keepdims=True) + 1e-12)
