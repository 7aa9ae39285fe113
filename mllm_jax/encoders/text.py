"""A small text transformer: the other tower of contrastive training (arXiv 2103.00020, section 2.4)."""

from __future__ import annotations

from dataclasses import dataclass

import jax.numpy as jnp
from flax import linen as nn

from mllm_jax.layers.attention import Attention
from mllm_jax.layers.linear import Embedding
from mllm_jax.layers.mlp import MLP
from mllm_jax.layers.norms import LayerNorm
from mllm_jax.layers.stack import scan_layers
from mllm_jax.sharding.logical import constrain


@dataclass(frozen=True)
class TextTowerConfig:
    """Sizes of a bidirectional text encoder that pools by the mean over its text."""

    vocab_size: int = 1024
    max_length: int = 64
    hidden_size: int = 192
    num_layers: int = 2
    num_heads: int = 3
    mlp_size: int = 768
    activation: str = "gelu"
    norm_eps: float = 1e-6
    dtype: str = "float32"
    remat: str = "none"
    scan_unroll: int = 1

    def make(self) -> TextTower:
        return TextTower(self)


class TextBlock(nn.Module):
    """Pre-norm transformer layer that attends within a segment."""

    config: TextTowerConfig

    @nn.compact
    def __call__(self, x, _, segments):
        c = self.config
        dtype = jnp.dtype(c.dtype)
        h = LayerNorm(c.norm_eps, dtype, name="attention_norm")(x)
        x = x + Attention(c.num_heads, dtype=dtype, name="attention")(h, segments=segments)[0]
        h = LayerNorm(c.norm_eps, dtype, name="mlp_norm")(x)
        x = x + MLP(c.mlp_size, c.activation, dtype=dtype, name="mlp")(h)
        return constrain(x, "batch", "seq", None), None


class TextTower(nn.Module):
    """Text to one vector."""

    config: TextTowerConfig

    @nn.compact
    def __call__(self, tokens, segments):
        """int[B, L], int[B, L] (0 is padding) -> dtype[B, E], the mean over the text."""
        c = self.config
        dtype = jnp.dtype(c.dtype)
        x = Embedding(c.vocab_size, c.hidden_size, dtype=dtype, name="token_embedding")(tokens)
        init = nn.with_logical_partitioning(nn.initializers.normal(0.02), (None, "embed"))
        positions = self.param("position_embedding", init, (c.max_length, c.hidden_size), jnp.float32)
        x = x + positions[: tokens.shape[1]].astype(dtype)
        layers = scan_layers(TextBlock, num_layers=c.num_layers, remat=c.remat, unroll=c.scan_unroll, num_broadcast=1)
        x, _ = layers(c, name="layers")(x, None, segments)
        x = LayerNorm(c.norm_eps, dtype, name="final_norm")(x)
        kept = (segments > 0)[..., None].astype(dtype)
        return (x * kept).sum(axis=1) / jnp.maximum(kept.sum(axis=1), 1)
