"""Attention pooling: a learned query that attends to all vectors and becomes the one that stands for them."""

from __future__ import annotations

import jax.numpy as jnp
from flax import linen as nn

from mllm_jax.layers.attention import attention
from mllm_jax.layers.linear import Linear
from mllm_jax.layers.mlp import MLP
from mllm_jax.layers.norms import LayerNorm


class AttentionPooling(nn.Module):
    """Multi-head attention pooling with an MLP behind it (arXiv 2106.04560, section 3.3, as in SigLIP)."""

    num_heads: int
    mlp_size: int
    activation: str
    norm_eps: float = 1e-6
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x):
        """dtype[B, N, E] -> dtype[B, E]"""
        width = x.shape[-1]
        init = nn.with_logical_partitioning(nn.initializers.normal(width**-0.5), ("queries", "embed"))
        probe = self.param("probe", init, (1, width), jnp.float32).astype(self.dtype)
        heads, names = (self.num_heads, width // self.num_heads), ("embed", "heads", "head_dim")
        q = Linear(heads, names, use_bias=True, dtype=self.dtype, name="q")(probe[None])
        k = Linear(heads, names, use_bias=True, dtype=self.dtype, name="k")(x)
        v = Linear(heads, names, use_bias=True, dtype=self.dtype, name="v")(x)
        y = attention(jnp.broadcast_to(q, (x.shape[0], *q.shape[1:])), k, v)
        out = ("heads", "head_dim", "embed")
        y = Linear((width,), out, in_ndim=2, use_bias=True, dtype=self.dtype, name="out")(y)
        h = LayerNorm(self.norm_eps, self.dtype, name="norm")(y)
        return (y + MLP(self.mlp_size, self.activation, dtype=self.dtype, name="mlp")(h))[:, 0]
