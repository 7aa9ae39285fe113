"""The Q-Former of BLIP-2 (arXiv 2301.12597, section 3.1) and InstructBLIP (arXiv 2305.06500): queries read an image.

It is a BERT whose input is a fixed number of learned queries and an optional text. Both attend to each other. In every
`cross_attention_frequency`-th layer the queries, not the text, also attend to the image. Queries and text have separate
feed-forward blocks. The last hidden states of the queries become the media tokens.
"""

from __future__ import annotations

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax import struct

from mllm_jax.errors import ConfigError, DataError
from mllm_jax.layers.attention import attention
from mllm_jax.layers.compute import WithCompute
from mllm_jax.layers.linear import Embedding, Linear
from mllm_jax.layers.mlp import ACTIVATIONS, MLP
from mllm_jax.layers.norms import LayerNorm
from mllm_jax.layers.requirements import Requirements
from mllm_jax.layers.stack import scan_layers
from mllm_jax.sharding.logical import constrain

# BERT's standard deviation of all initial weights but norms and biases.
INIT_STD = 0.02


@dataclass(frozen=True)
class QFormerConfig(WithCompute):
    """Sizes and options of a Q-Former; the defaults are BERT-base with 32 queries.

    Attributes:
        output_size: width of a media token; None takes the LLM's hidden size. Without an LLM, None leaves out the map
            to it.
        feature_size: width of the input features; None accepts any.
        num_queries: number of media tokens of an image of any size.
        cross_attention_frequency: n, if layers 0, n, 2n, ... have cross-attention.
        vocab_size: number of token ids; None is a Q-Former without text and without parameters for it.
        max_length: the most tokens of a text.
    """

    output_size: int | None = None
    feature_size: int | None = None
    hidden_size: int = 768
    num_layers: int = 12
    num_heads: int = 12
    mlp_size: int = 3072
    num_queries: int = 32
    cross_attention_frequency: int = 2
    activation: str = "gelu"
    norm_eps: float = 1e-12
    vocab_size: int | None = None
    max_length: int = 512

    def __post_init__(self):
        require = Requirements("Q-Former", self)
        require.one_of("activation", ACTIVATIONS)
        require.heads()
        require(
            self.num_layers > 0 and self.cross_attention_frequency > 0,
            f"{self.num_layers} layers, every {self.cross_attention_frequency}th with cross-attention",
            "at least one layer, and a frequency of at least 1",
            "change num_layers or cross_attention_frequency",
        )

    @property
    def group(self) -> tuple[bool, ...]:
        """Flags of cross-attention of the repeated layers: all layers if the frequency does not divide num_layers."""
        divides = self.num_layers % self.cross_attention_frequency == 0
        size = self.cross_attention_frequency if divides else self.num_layers
        return tuple(i % self.cross_attention_frequency == 0 for i in range(size))

    @property
    def reads_text(self) -> bool:
        return self.vocab_size is not None

    pointwise = False  # the queries read all input vectors

    def num_tokens(self, grid: int) -> int:
        """Returns the media tokens of an image of grid x grid patches: one for each query."""
        return self.num_queries

    def make(self) -> QFormer:
        return QFormer(self)


@struct.dataclass
class QFormerCache:
    """The keys and values of the queries in each layer, encoded without a text, from which texts are generated.

    Attributes:
        keys, values: [num_layers / layers that repeat, layers that repeat, N, num_queries, heads, head_dim].
    """

    keys: jax.Array
    values: jax.Array


class QFormerAttention(nn.Module):
    """Attention of one sequence to another, with a residual connection and then a norm, as in BERT."""

    config: QFormerConfig

    @nn.compact
    def __call__(self, x, source, cached=None, *, k_segments=None, q_index=None):
        """Maps x [N, S, E] and source [N, T, F] to [N, S, E] and the source's keys and values [N, T, heads, head_dim].

        Args:
            cached: keys and values that come before the source's, or None.
            k_segments: int[N, T], 0 at hidden keys, or None.
            q_index: int[N, S], index of the last key that each query sees; None shows all keys.
        """
        c = self.config
        dtype, heads = jnp.dtype(c.dtype), (c.num_heads, c.hidden_size // c.num_heads)
        common = dict(features=heads, use_bias=True, init_std=INIT_STD, dtype=dtype)
        q = Linear(names=("embed", "heads", "head_dim"), **common, name="q")(x)
        k = Linear(names=("embed", "heads", "head_dim"), **common, name="k")(source)
        v = Linear(names=("embed", "heads", "head_dim"), **common, name="v")(source)
        made = (k, v)
        if cached is not None:
            k, v = (jnp.concatenate(pair, axis=1) for pair in zip(cached, made, strict=True))
        q_segments = None
        if k_segments is not None:
            q_segments, k_segments = jnp.ones(q.shape[:2], jnp.int32), (k_segments != 0).astype(jnp.int32)
        mask = "full" if q_index is None else "causal"
        y = attention(q, k, v, mask=mask, q_segments=q_segments, k_segments=k_segments, q_index=q_index)
        names = ("heads", "head_dim", "embed")
        y = Linear((c.hidden_size,), names, in_ndim=2, use_bias=True, init_std=INIT_STD, dtype=dtype, name="out")(y)
        return LayerNorm(c.norm_eps, dtype, name="norm")(x + y), made


class FeedForward(nn.Module):
    """MLP, residual connection and norm."""

    config: QFormerConfig

    @nn.compact
    def __call__(self, x):
        c = self.config
        dtype = jnp.dtype(c.dtype)
        y = MLP(c.mlp_size, c.activation, out_init_std=INIT_STD, dtype=dtype, name="mlp")(x)
        return LayerNorm(c.norm_eps, dtype, name="norm")(x + y)


class QFormerLayer(nn.Module):
    """Layer of a Q-Former; its queries attend to the image if `crosses`."""

    config: QFormerConfig
    crosses: bool

    @nn.compact
    def __call__(self, x, cached, queries: int, features, features_segments, k_segments, q_index):
        """Applies the layer to [N, queries + text, E]; see `QFormer.run`."""
        own = QFormerAttention(self.config, name="attention")
        x, made = own(x, x, cached, k_segments=k_segments, q_index=q_index)
        parts = []
        if queries:
            part = x[:, :queries]
            if self.crosses:
                cross = QFormerAttention(self.config, name="cross_attention")
                part, _ = cross(part, features, k_segments=features_segments)
            parts.append(FeedForward(self.config, name="query_mlp")(part))
        if x.shape[1] > queries:
            parts.append(FeedForward(self.config, name="text_mlp")(x[:, queries:]))
        return constrain(jnp.concatenate(parts, axis=1), "batch", "seq", None), made


class QFormerGroup(nn.Module):
    """A group of layers that repeats, see `QFormerConfig.group`."""

    config: QFormerConfig
    queries: int

    @nn.compact
    def __call__(self, x, cached, *broadcast):
        made = []
        for i, crosses in enumerate(self.config.group):
            layer = QFormerLayer(self.config, crosses, name=f"layer_{i}")
            held = None if cached is None else (cached.keys[i], cached.values[i])
            x, keys_values = layer(x, held, self.queries, *broadcast)
            made.append(keys_values)
        keys, values = (jnp.stack(each) for each in zip(*made, strict=True))
        return x, QFormerCache(keys, values)


class QFormer(nn.Module):
    """Q-Former from features and an optional text to media tokens (`Blip2QFormerModel`, `InstructBlipQFormerModel`)."""

    config: QFormerConfig

    def setup(self):
        c = self.config
        dtype = jnp.dtype(c.dtype)
        init = nn.with_logical_partitioning(nn.initializers.normal(INIT_STD), ("queries", "embed"))
        self.query = self.param("query", init, (c.num_queries, c.hidden_size), jnp.float32)
        if c.reads_text:
            self.token_embedding = Embedding(c.vocab_size, c.hidden_size, dtype=dtype)
            self.position_embedding = Embedding(c.max_length, c.hidden_size, names=(None, "embed"), dtype=dtype)
        self.embedding_norm = LayerNorm(c.norm_eps, dtype)
        if c.output_size is not None:
            self.language_projection = Linear(
                (c.output_size,), ("channels", "embed"), use_bias=True, init_std=INIT_STD, dtype=dtype
            )

    def __call__(self, features, tokens=None, segments=None):
        """Returns the media tokens of images.

        Args:
            features: dtype[N, P, feature_size].
            tokens, segments: int[N, L], the text that the queries also read, or None; segments are 0 at padding.

        Returns:
            dtype[N, num_queries, output_size].
        """
        queries = self.encode(features, tokens, segments)[0][:, : self.config.num_queries]
        return queries if self.config.output_size is None else self.language_projection(queries)

    def encode(self, features, tokens=None, segments=None, *, feature_segments=None):
        """Encodes the queries and then the text, all of which see each other.

        Args:
            feature_segments: int[N, P], 0 at padding, or None.

        Returns:
            (dtype[N, num_queries + L, E], QFormerCache).

        Raises:
            ConfigError, DataError: see `read`, and features of another width.
        """
        c = self.config
        if c.feature_size not in (None, features.shape[-1]):
            raise DataError(
                f"features of width {features.shape[-1]}", f"{c.feature_size}", "change the Q-Former's feature_size"
            )
        rows = features.shape[0]
        x = jnp.broadcast_to(self.query.astype(c.dtype), (rows, *self.query.shape))
        k_segments = None
        if tokens is not None:
            segments = jnp.ones_like(tokens) if segments is None else segments
            x = jnp.concatenate([x, self._embed(tokens)], axis=1)
            k_segments = jnp.concatenate([jnp.ones((rows, c.num_queries), segments.dtype), segments], axis=1)
        return self.run(x, c.num_queries, None, features, feature_segments, k_segments, None)

    def read(self, tokens, segments=None, cache: QFormerCache | None = None):
        """Encodes a text by itself, or a text after the queries.

        Args:
            tokens: int[N, L], one text a row.
            segments: int[N, L], 0 at padding, or None.
            cache: the cache of `encode` without a text: a token sees the queries, itself and the tokens before it. With
                None, every token sees the whole text and no queries.

        Returns:
            dtype[N, L, E].

        Raises:
            ConfigError: a Q-Former without a vocabulary.
            DataError: a text longer than max_length.
        """
        x, q_index = self._embed(tokens), None
        segments = jnp.ones_like(tokens) if segments is None else segments
        if cache is not None:
            queries = cache.keys.shape[3]
            q_index = jnp.broadcast_to(queries + jnp.arange(tokens.shape[1]), tokens.shape)
            segments = jnp.concatenate([jnp.ones((tokens.shape[0], queries), segments.dtype), segments], axis=1)
        return self.run(x, 0, cache, None, None, segments, q_index)[0]

    def _embed(self, tokens):
        """Maps int[N, L] to dtype[N, L, E]; positions count from 0."""
        c = self.config
        if not c.reads_text:
            raise ConfigError(
                "a text for a Q-Former without vocab_size", "vocab_size, or no text", "set the Q-Former's vocab_size"
            )
        if tokens.shape[1] > c.max_length:
            raise DataError(
                f"a text of {tokens.shape[1]} tokens for a Q-Former of {c.max_length} positions",
                f"at most {c.max_length}",
                "shorten the text",
            )
        positions = self.position_embedding(jnp.arange(tokens.shape[1]))
        return constrain(self.token_embedding(tokens) + positions, "batch", "seq", None)

    @nn.compact
    def run(self, x, queries: int, cache, features, feature_segments, k_segments, q_index):
        """Applies the layers to embedded queries (the first `queries` positions) and text."""
        c = self.config
        groups = c.num_layers // len(c.group)
        stack = scan_layers(QFormerGroup, num_layers=groups, remat=c.remat, unroll=c.scan_unroll, num_broadcast=4)
        x = constrain(self.embedding_norm(x), "batch", "seq", None)
        return stack(c, queries, name="layers")(x, cache, features, feature_segments, k_segments, q_index)
