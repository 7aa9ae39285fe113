"""T5's attention, which does not scale its scores, and the layers of its encoder and decoder (arXiv 1910.10683)."""

from __future__ import annotations

from typing import TYPE_CHECKING

import jax.numpy as jnp
from flax import linen as nn

from mllm_jax.layers.attention import attention, write_at
from mllm_jax.layers.linear import Linear
from mllm_jax.layers.mlp import MLP
from mllm_jax.layers.norms import RMSNorm
from mllm_jax.sharding.logical import constrain

if TYPE_CHECKING:
    from mllm_jax.llms.t5 import T5Config


class T5Attention(nn.Module):
    """Multi-head attention from x to given keys and values; the scores are not scaled."""

    config: T5Config

    def setup(self):
        c = self.config
        dtype = jnp.dtype(c.dtype)
        inner, names = (c.num_heads, c.head_dim), ("embed", "heads", "head_dim")
        # The queries' standard deviation contains the missing 1/sqrt(head_dim).
        self.q = Linear(inner, names, init_std=(c.hidden_size * c.head_dim) ** -0.5, dtype=dtype)
        self.k = Linear(inner, names, dtype=dtype)
        self.v = Linear(inner, names, dtype=dtype)
        self.out = Linear((c.hidden_size,), (*names[1:], "embed"), in_ndim=2, dtype=dtype)

    def keys_values(self, x):
        """Maps [B, T, E] to keys and values [B, T, N, H]."""
        return self.k(x), self.v(x)

    def __call__(self, x, keys_values, **where):
        """Maps [B, S, E] to [B, S, E]; `where` holds arguments of `attention`."""
        q = constrain(self.q(x), "batch", "seq", "heads", "head_dim")
        k, v = (each.astype(q.dtype) for each in keys_values)
        return self.out(constrain(attention(q, k, v, scale=1.0, **where), "batch", "seq", "heads", "head_dim"))


class EncoderBlock(nn.Module):
    """Self-attention over a segment, then the MLP, each after an RMSNorm and with a residual connection."""

    config: T5Config

    @nn.compact
    def __call__(self, x, _, segments, bias):
        c = self.config
        dtype = jnp.dtype(c.dtype)
        h = RMSNorm(c.dialect.norm_eps, dtype, name="attention_norm")(x)
        own = T5Attention(c, name="attention")
        x = x + own(h, own.keys_values(h), q_segments=segments, k_segments=segments, bias=bias)
        h = RMSNorm(c.dialect.norm_eps, dtype, name="mlp_norm")(x)
        x = x + MLP(c.mlp_size, c.activation, c.dialect.gated, use_bias=False, dtype=dtype, name="mlp")(h)
        return constrain(x, "batch", "seq", None), None


class T5DecoderBlock(nn.Module):
    """Causal self-attention, cross-attention to the source, MLP."""

    config: T5Config

    @nn.compact
    def __call__(self, x, layer_cache, segments, bias, source, source_segments, cache_position):
        """Applies the layer; without x, only computes the keys and values of the source.

        Args:
            layer_cache: None, or (keys, values, cross keys, cross values).
            source: [B, S, E] from the encoder, not read with a cache.
            cache_position: None, or (segments of the cache, index of x in it).

        Returns:
            (x, the keys and values of the layer's cache).
        """
        c = self.config
        dtype = jnp.dtype(c.dtype)
        own, cross = T5Attention(c, name="attention"), T5Attention(c, name="cross_attention")
        if x is None:
            return None, cross.keys_values(source)
        h = RMSNorm(c.dialect.norm_eps, dtype, name="attention_norm")(x)
        k, v = own.keys_values(h)
        k_segments, index, written = segments, None, None
        if layer_cache is not None:
            k_segments, index = cache_position
            k, v = written = write_at(layer_cache[0], k, index), write_at(layer_cache[1], v, index)
        x = x + own(h, (k, v), mask="causal", q_segments=segments, k_segments=k_segments, q_index=index, bias=bias)
        h = RMSNorm(c.dialect.norm_eps, dtype, name="cross_attention_norm")(x)
        seen = cross.keys_values(source) if layer_cache is None else layer_cache[2:]
        x = x + cross(h, seen, q_segments=segments, k_segments=source_segments)
        h = RMSNorm(c.dialect.norm_eps, dtype, name="mlp_norm")(x)
        x = x + MLP(c.mlp_size, c.activation, c.dialect.gated, use_bias=False, dtype=dtype, name="mlp")(h)
        return constrain(x, "batch", "seq", None), written
