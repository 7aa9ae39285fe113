"""The parts of BEATs: attention with a gated relative bias, and the layer."""

from __future__ import annotations

from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
from einops import rearrange
from flax import linen as nn

from mllm_jax.layers.attention import attention
from mllm_jax.layers.linear import Linear
from mllm_jax.layers.mlp import MLP
from mllm_jax.layers.norms import LayerNorm
from mllm_jax.sharding.logical import constrain

if TYPE_CHECKING:
    from mllm_jax.encoders.beats import BEATsConfig

NORM_EPS = 1e-5
GATES = 2, 4  # the gate's map has two groups of four outputs, and each group is summed


class BEATsAttention(nn.Module):
    """Self-attention with a bias by distance, which every query may scale by a gate (arXiv 2110.13900, section 3.1)."""

    config: BEATsConfig

    @nn.compact
    def __call__(self, x, segments, bias):
        """Maps dtype[B, S, E] to the same.

        Args:
            segments: None, or int[B, S] of the queries and int[B, S] of the keys: a query sees keys of its segment.
            bias: None, or float32[1, N, S, S].
        """
        c = self.config
        dtype = jnp.dtype(c.dtype)
        heads, names = (c.num_heads, c.hidden_size // c.num_heads), ("embed", "heads", "head_dim")
        q, k, v = (Linear(heads, names, use_bias=True, dtype=dtype, name=name)(x) for name in "qkv")
        q = constrain(q, "batch", "seq", "heads", "head_dim")
        if c.dialect.gated_bias:
            bias = bias * rearrange(self._gate(q), "b s n -> b n s 1")
        q_segments, k_segments = segments or (None, None)
        y = attention(q, k, v, q_segments=q_segments, k_segments=k_segments, bias=bias)
        y = constrain(y, "batch", "seq", "heads", "head_dim")
        return Linear((c.hidden_size,), (*names[1:], "embed"), in_ndim=2, use_bias=True, dtype=dtype, name="out")(y)

    def _gate(self, q):
        """Maps queries dtype[B, S, N, H] to the factors of their biases, float32[B, S, N]."""
        groups, size = GATES
        gates = Linear((groups * size,), ("head_dim", None), use_bias=True, name="gate")(q)
        gates = jax.nn.sigmoid(rearrange(gates, "... (g f) -> ... g f", g=groups).sum(axis=-1))
        init = nn.with_logical_partitioning(nn.initializers.ones, ("heads",))
        scale = self.param("gate_scale", init, (self.config.num_heads,), jnp.float32)
        return gates[..., 0] * (gates[..., 1] * scale - 1.0) + 2.0


class BEATsBlock(nn.Module):
    """Transformer layer; `capture` also returns its output to the scan.

    Deep-norm multiplies what the layer adds to by (2 * num_layers)^(1/4) (arXiv 2203.00555).
    """

    config: BEATsConfig
    capture: bool = False

    @nn.compact
    def __call__(self, x, _, segments, bias):
        c, dialect = self.config, self.config.dialect
        dtype = jnp.dtype(c.dtype)
        scale = (2 * c.num_layers) ** 0.25 if dialect.deep_norm else 1.0
        own = BEATsAttention(c, name="attention")
        mlp = MLP(c.mlp_size, c.activation, dialect.gated, dtype=dtype, name="mlp")
        for part, branch in (("attention", lambda h: own(h, segments, bias)), ("mlp", mlp)):
            norm = LayerNorm(NORM_EPS, dtype, name=f"{part}_norm")
            x = x + branch(norm(x)) if dialect.norm_first else norm(scale * x + branch(x))
        x = constrain(x, "batch", "patches", None)
        return x, x if self.capture else None
