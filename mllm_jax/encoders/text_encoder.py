"""Text encoders for contrastive training: by its options CLIP's, SigLIP's or a small one of our own."""

from __future__ import annotations

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax import struct

from mllm_jax.errors import ConfigError
from mllm_jax.layers.attention import MASKS, Attention
from mllm_jax.layers.compute import WithCompute
from mllm_jax.layers.linear import Embedding, Linear
from mllm_jax.layers.mlp import ACTIVATIONS, MLP
from mllm_jax.layers.norms import LayerNorm
from mllm_jax.layers.requirements import Requirements
from mllm_jax.layers.stack import layers_of
from mllm_jax.sharding.logical import constrain

POOLINGS = ("mean", "last", "eos", "largest")


@dataclass(frozen=True)
class TextTowerDialect:
    """Details that distinguish the families of text encoders; the defaults are for a small one from scratch.

    Attributes:
        mask: "full", or "causal": a token sees itself and the tokens before it (CLIP, arXiv 2103.00020, section 2.4).
        pooling: the vector of a text: "mean" of its tokens; the "last" token; "eos", the first `eos_token_id`;
            "largest", the first token with the largest id, which in CLIP's vocabulary is the end of text.
        head_size: None, or the width of a linear map with bias of the pooled vector (SigLIP).
        projection_size: None, or the width of a linear map without bias after it (CLIPTextModelWithProjection).
        family: None, or the Hugging Face architecture of the saved folder: the module is then a `TextModel`.
    """

    norm_eps: float = 1e-6
    mask: str = "full"
    pooling: str = "mean"
    head_size: int | None = None
    projection_size: int | None = None
    family: str | None = None


@dataclass(frozen=True)
class TextTowerConfig(WithCompute):
    """Sizes of a text encoder; details that only reproduce a family are in its dialect.

    Attributes:
        vocab_size: None takes the vocabulary of the experiment's tokenizer.
        max_length: number of positions.
        num_layers: 0 is a bag of words, in which the vector of an unseen name is the sum of its words' vectors.
        bos_token_id, eos_token_id, pad_token_id: of the tokenizer.
    """

    vocab_size: int | None = None
    max_length: int = 64
    hidden_size: int = 192
    num_layers: int = 2
    num_heads: int = 3
    mlp_size: int = 768
    activation: str = "gelu"
    bos_token_id: int | None = None
    eos_token_id: int | None = None
    pad_token_id: int | None = None
    dialect: TextTowerDialect = TextTowerDialect()

    def __post_init__(self):
        require = Requirements("text encoder", self)
        require.one_of("dialect.mask", MASKS)
        require.one_of("dialect.pooling", POOLINGS)
        require.one_of("activation", ACTIVATIONS)
        require(
            self.dialect.pooling != "eos" or self.eos_token_id is not None,
            "dialect.pooling 'eos' without eos_token_id",
            "the id",
            "set eos_token_id",
        )
        if self.num_layers:
            require.heads()

    @property
    def output_size(self) -> int:
        """The width of a text's vector."""
        return self.dialect.projection_size or self.dialect.head_size or self.hidden_size

    @property
    def family(self) -> str | None:
        """The Hugging Face architecture of the saved folder; with None the module is a `TextTower`."""
        return self.dialect.family

    def make(self) -> TextTower | TextModel:
        Requirements("text encoder", self).given("vocab_size")
        return (TextTower if self.family is None else TextModel)(self)


@struct.dataclass
class TextOutput:
    """The output of a text encoder.

    Attributes:
        last_hidden_state: [B, L, E] after the final norm.
        pooler_output: [B, E], or with a head [B, head_size].
        text_embeds: [B, projection_size], None without a projection.
        hidden_states: None, or embeddings and then each layer's output, each [B, L, E].
    """

    last_hidden_state: jax.Array
    pooler_output: jax.Array
    text_embeds: jax.Array | None = None
    hidden_states: tuple[jax.Array, ...] | None = None


class TextBlock(nn.Module):
    """Pre-norm transformer layer that attends within a segment, or to the keys that a mask allows."""

    config: TextTowerConfig
    keep: bool = False

    @nn.compact
    def __call__(self, x, _, segments, keys):
        c = self.config
        dtype = jnp.dtype(c.dtype)
        h = LayerNorm(c.dialect.norm_eps, dtype, name="attention_norm")(x)
        cache = None
        if keys is not None:
            # A cache that x fills gives the keys other segments than the queries.
            empty = jnp.zeros((*x.shape[:2], c.num_heads, c.hidden_size // c.num_heads), dtype)
            cache = empty, empty, keys, jnp.broadcast_to(jnp.arange(x.shape[1]), x.shape[:2])
        attention = Attention(c.num_heads, mask=c.dialect.mask, dtype=dtype, name="attention")
        x = x + attention(h, segments=segments, cache=cache)[0]
        h = LayerNorm(c.dialect.norm_eps, dtype, name="mlp_norm")(x)
        x = x + MLP(c.mlp_size, c.activation, dtype=dtype, name="mlp")(h)
        x = constrain(x, "batch", "seq", None)
        return x, x if self.keep else None


class TextTower(nn.Module):
    """Encoder of texts to one vector each."""

    config: TextTowerConfig

    def __call__(self, tokens, positions, segments, count: int = 1):
        """Maps int[B, L] each, with `count` texts in a row as segments 1..count (0 is padding), to dtype[B, count, P].

        P is `config.output_size`. With pooling "mean", the vector of an absent text is 0.
        """
        return self.embed(tokens, positions, segments, count)

    def embed(self, tokens, positions, segments, count: int = 1):
        """Maps packed texts to their vectors, see `__call__`."""
        member = segments[:, None] == jnp.arange(1, count + 1)[None, :, None]
        out = self.run(tokens, positions, segments, None, member)
        return out.pooler_output if out.text_embeds is None else out.text_embeds

    def states(self, tokens):
        """Returns the last hidden state dtype[B, L, E] of every token of int[B, L], one text a row, padding included.

        Generators read texts so: their rows are as long as in training, without a mask.
        """
        positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
        member = jnp.ones((tokens.shape[0], 1, tokens.shape[1]), bool)
        return self.run(tokens, positions, None, None, member).last_hidden_state

    @nn.compact
    def run(self, tokens, positions, segments, keys, member, keep: bool = False) -> TextOutput:
        """Encodes and pools texts.

        Args:
            tokens, positions: int[B, L].
            segments: int[B, L] or None: a token sees its own segment.
            keys: int[B, L] or None: a token sees the tokens whose number here equals its own segment.
            member: bool[B, C, L], the tokens of each text; the pooled vectors have an axis C.
            keep: whether to return the hidden states.
        """
        c, dialect = self.config, self.config.dialect
        dtype = jnp.dtype(c.dtype)
        x = Embedding(c.vocab_size, c.hidden_size, dtype=dtype, name="token_embedding")(tokens)
        states = None
        if c.num_layers:
            init = nn.with_logical_partitioning(nn.initializers.normal(0.02), (None, "embed"))
            table = self.param("position_embedding", init, (c.max_length, c.hidden_size), jnp.float32)
            embedded = x = x + jnp.take(table, positions, axis=0).astype(dtype)
            x, states = layers_of(c, TextBlock, 2)(c, keep, name="layers")(x, None, segments, keys)
        x = LayerNorm(dialect.norm_eps, dtype, name="final_norm")(x)
        pooled, projected = _pool(c, x, tokens, member), None
        if dialect.head_size is not None:
            pooled = Linear((dialect.head_size,), ("embed", None), use_bias=True, dtype=dtype, name="head")(pooled)
        if dialect.projection_size is not None:
            projected = Linear((dialect.projection_size,), ("embed", None), dtype=dtype, name="projection")(pooled)
        return TextOutput(x, pooled, projected, (embedded, *states) if keep and c.num_layers else None)


class TextModel(TextTower):
    """A text encoder that is called like Hugging Face's classes."""

    def __call__(self, tokens, mask=None, *, output_hidden_states: bool = False) -> TextOutput:
        """Encodes one text a row.

        Args:
            tokens: int[B, L].
            mask: int[B, L], 0 at positions that no token may see, or None. Pooling "mean" averages the others. Other
                poolings ignore it: SigLIP reads the last position even if it is padding, so pad its texts to
                `max_length`, as in training.

        Raises:
            ConfigError: more tokens than positions.
        """
        if tokens.shape[1] > self.config.max_length:
            raise ConfigError(
                f"a text of {tokens.shape[1]} tokens", f"at most {self.config.max_length}", "shorten the text"
            )
        positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
        member = jnp.ones((tokens.shape[0], 1, tokens.shape[1]), bool)
        if self.config.dialect.pooling == "mean" and mask is not None:
            member = (mask != 0)[:, None]
        segments = None if mask is None else jnp.ones_like(tokens)
        keys = None if mask is None else (mask != 0).astype(tokens.dtype)
        out = self.run(tokens, positions, segments, keys, member, output_hidden_states)
        embeds = None if out.text_embeds is None else out.text_embeds[:, 0]
        return out.replace(pooler_output=out.pooler_output[:, 0], text_embeds=embeds)


def _pool(c: TextTowerConfig, x, tokens, member):
    """Pools dtype[B, L, E] to dtype[B, C, E]; tokens are int[B, L], member bool[B, C, L]."""
    if c.dialect.pooling == "mean":
        share = member.astype(x.dtype)
        return jnp.einsum("bcl,ble->bce", share, x) / jnp.maximum(share.sum(axis=-1), 1)[..., None]
    if c.dialect.pooling == "last":
        position = jnp.where(member, jnp.arange(tokens.shape[1]), 0).max(axis=-1)
    elif c.dialect.pooling == "eos":
        position = (member * (1 + (tokens == c.eos_token_id)[:, None])).argmax(axis=-1)
    else:
        position = jnp.where(member, tokens[:, None], -1).argmax(axis=-1)
    return jnp.take_along_axis(x, position[..., None], axis=1)
