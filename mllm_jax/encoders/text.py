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
    """Sizes of a bidirectional text encoder that pools by the mean over each text.

    Attributes:
        num_layers: 0 is a bag of words: what the parts of a name add up to then holds for names never seen.
    """

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
    """Texts to one vector each."""

    config: TextTowerConfig

    @nn.compact
    def __call__(self, tokens, positions, segments, count: int = 1):
        """int[B, L] each, `count` texts packed in a row as segments 1..count (0 is padding) -> dtype[B, count, E]."""
        c = self.config
        dtype = jnp.dtype(c.dtype)
        x = Embedding(c.vocab_size, c.hidden_size, dtype=dtype, name="token_embedding")(tokens)
        if c.num_layers:
            init = nn.with_logical_partitioning(nn.initializers.normal(0.02), (None, "embed"))
            table = self.param("position_embedding", init, (c.max_length, c.hidden_size), jnp.float32)
            x = x + jnp.take(table, positions, axis=0).astype(dtype)
            x, _ = scan_layers(
                TextBlock, num_layers=c.num_layers, remat=c.remat, unroll=c.scan_unroll, num_broadcast=1
            )(c, name="layers")(x, None, segments)
        x = LayerNorm(c.norm_eps, dtype, name="final_norm")(x)
        member = (segments[:, None] == jnp.arange(1, count + 1)[None, :, None]).astype(dtype)
        return jnp.einsum("bcl,ble->bce", member, x) / jnp.maximum(member.sum(axis=-1), 1)[..., None]
