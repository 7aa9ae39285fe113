"""GILL's mapper (arXiv 2305.17216, section 3.2), which NExT-GPT took over: learned queries read the signal tokens.

A linear map brings the sum of a signal token's state and its embedding to the mapper's width. An encoder reads the
signals, and a decoder, whose queries are learned, reads them from there. There are no masks and no positions: the
signals' embeddings distinguish them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import jax.numpy as jnp
from flax import linen as nn

from mllm_jax.layers.attention import attention
from mllm_jax.layers.linear import Linear
from mllm_jax.layers.mlp import ACTIVATIONS, MLP
from mllm_jax.layers.norms import LayerNorm
from mllm_jax.layers.requirements import Requirements
from mllm_jax.layers.stack import layers_of
from mllm_jax.output_projectors.protocol import TokensToCondition
from mllm_jax.sharding.logical import constrain


@dataclass(frozen=True)
class TransformerMapperConfig(TokensToCondition):
    """Sizes of a mapper; the defaults are those of GILL and NExT-GPT.

    Attributes:
        output_tokens: number of learned queries, which become the condition.
        hidden_size: width of the mapper.
        num_layers: of the encoder, and of the decoder.
        mlp_size: None is 4 x hidden_size.
    """

    output_tokens: int = 77
    hidden_size: int = 512
    num_layers: int = 4
    num_heads: int = 4
    mlp_size: int | None = None
    activation: str = "relu"
    norm_eps: float = 1e-5

    reads_embeddings: ClassVar[bool] = True

    def __post_init__(self):
        super().__post_init__()
        require = Requirements("transformer output projector", self)
        require.heads()
        require.one_of("activation", ACTIVATIONS)
        require(self.num_layers >= 1, f"{self.num_layers} layers", "at least one", "change num_layers")

    def make(self) -> TransformerMapper:
        Requirements("transformer output projector", self).given("input_size")
        return TransformerMapper(self)


class MapperAttention(nn.Module):
    """Multi-head attention from x to a source, with biases, as in torch's `nn.MultiheadAttention`."""

    config: TransformerMapperConfig

    @nn.compact
    def __call__(self, x, source, segments=None):
        """Maps x [B, S, E] and source [B, T, E] to [B, S, E].

        Args:
            segments: int[B, T], 0 at vectors of the source that no query sees, or None.
        """
        c = self.config
        dtype, names = jnp.dtype(c.dtype), ("embed", "heads", "head_dim")
        heads = (c.num_heads, c.hidden_size // c.num_heads)
        q, k, v = (
            Linear(heads, names, use_bias=True, dtype=dtype, name=name)(read)
            for name, read in (("q", x), ("k", source), ("v", source))
        )
        asking = None if segments is None else jnp.ones(x.shape[:2], segments.dtype)
        y = attention(q, k, v, q_segments=asking, k_segments=segments)
        y = constrain(y, "batch", "queries", "heads", "head_dim")
        out = Linear((c.hidden_size,), (*names[1:], "embed"), in_ndim=2, use_bias=True, dtype=dtype, name="out")
        return out(y)


def _norm(c: TransformerMapperConfig, name: str) -> LayerNorm:
    return LayerNorm(c.norm_eps, jnp.dtype(c.dtype), name=name)


def _mlp(c: TransformerMapperConfig) -> MLP:
    return MLP(c.mlp_size or 4 * c.hidden_size, c.activation, dtype=jnp.dtype(c.dtype), name="mlp")


class MapperEncoderLayer(nn.Module):
    """Self-attention over the signals, then the MLP, each after a LayerNorm and with a residual connection."""

    config: TransformerMapperConfig

    @nn.compact
    def __call__(self, x, _, segments):
        c = self.config
        h = _norm(c, "attention_norm")(x)
        x = x + MapperAttention(c, name="attention")(h, h, segments)
        x = x + _mlp(c)(_norm(c, "mlp_norm")(x))
        return constrain(x, "batch", "queries", None), None


class MapperDecoderLayer(nn.Module):
    """Self-attention over the queries, cross-attention to the encoded signals, MLP."""

    config: TransformerMapperConfig

    @nn.compact
    def __call__(self, x, _, source, segments):
        c = self.config
        h = _norm(c, "attention_norm")(x)
        x = x + MapperAttention(c, name="attention")(h, h)
        h = _norm(c, "cross_attention_norm")(x)
        x = x + MapperAttention(c, name="cross_attention")(h, source, segments)
        x = x + _mlp(c)(_norm(c, "mlp_norm")(x))
        return constrain(x, "batch", "queries", None), None


class TransformerMapper(nn.Module):
    """Mapper from signal tokens to a generator's condition (reference: `TextFcLayer` of GILL and NExT-GPT)."""

    config: TransformerMapperConfig

    @nn.compact
    def __call__(self, states, embeddings=None, mask=None):
        """Maps states and embeddings dtype[B, N, E] to dtype[B, output_tokens, output_size].

        Args:
            mask: bool[B, N], False at signals that are not read, or None.

        Raises:
            DataError: states or embeddings of another shape, or no embeddings.
        """
        c, dtype = self.config, jnp.dtype(self.config.dtype)
        c.check(states, embeddings)
        segments = None if mask is None else mask.astype(jnp.int32)
        x = states.astype(dtype) + embeddings.astype(dtype)
        x = Linear((c.hidden_size,), ("channels", "embed"), use_bias=True, dtype=dtype, name="input")(x)
        x, _ = layers_of(c, MapperEncoderLayer, 1)(c, name="encoder")(x, None, segments)
        source = _norm(c, "encoder_norm")(x)
        init = nn.with_logical_partitioning(nn.initializers.normal(1.0), ("queries", "embed"))
        queries = self.param("query", init, (c.output_tokens, c.hidden_size), jnp.float32).astype(dtype)
        y = jnp.broadcast_to(queries, (states.shape[0], *queries.shape))
        y, _ = layers_of(c, MapperDecoderLayer, 2)(c, name="decoder")(y, None, source, segments)
        y = _norm(c, "decoder_norm")(y)
        y = Linear((c.output_size,), ("embed", "channels"), use_bias=True, dtype=dtype, name="out")(y)
        return constrain(y, "batch", "queries", None)
