"""Whisper's decoder (arXiv 2212.04356): a language model that attends to an encoded source, with learned positions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from flax import linen as nn

from mllm_jax.checkpoints.config_json import Fields
from mllm_jax.checkpoints.config_options import ACTIVATIONS
from mllm_jax.checkpoints.table import OUT_OF_HEADS, Table, Weight, into_heads, linear, norm
from mllm_jax.errors import ConfigError
from mllm_jax.layers.attention import Attention, attention
from mllm_jax.layers.compute import WithCompute
from mllm_jax.layers.head import head_inputs
from mllm_jax.layers.linear import Embedding, Linear
from mllm_jax.layers.mlp import MLP
from mllm_jax.layers.norms import LayerNorm
from mllm_jax.layers.requirements import Requirements
from mllm_jax.layers.stack import layers_of
from mllm_jax.llms.cache import CrossCache
from mllm_jax.sharding.logical import constrain

NORM_EPS = 1e-5


@dataclass(frozen=True)
class WhisperDecoderConfig(WithCompute):
    """Sizes of a Whisper decoder; the defaults are Whisper tiny's.

    Attributes:
        hidden_size: also of the encoded source.
        tie_word_embeddings: whether the head is the transposed embedding; otherwise it has its own weights.
        decoder_start_token_id: the first token that the decoder reads.
        eos_token_id: each of them ends a text.
    """

    vocab_size: int = 51865
    hidden_size: int = 384
    num_layers: int = 4
    num_heads: int = 6
    mlp_size: int = 1536
    activation: str = "gelu"
    max_position_embeddings: int = 448
    tie_word_embeddings: bool = True
    bos_token_id: int | None = 50256
    eos_token_id: tuple[int, ...] = (50256,)
    pad_token_id: int | None = 50256
    decoder_start_token_id: int = 50257

    family = None  # it is saved as a part of Whisper
    encoder_decoder = True  # see `mllm_jax.llms.protocol`

    def __post_init__(self):
        require = Requirements("Whisper decoder", self)
        require.one_of("activation", sorted(set(ACTIVATIONS.values())))
        require.heads()

    def make(self) -> WhisperDecoder:
        return WhisperDecoder(self)

    def make_cache(self, batch: int, size: int, source: int = 1) -> CrossCache:
        """Returns an empty cache for at most `size` tokens and a source of `source` vectors, which `start` adds."""
        head_dim = self.hidden_size // self.num_heads
        how = dict(source=source, dtype=jnp.dtype(self.dtype))
        return CrossCache.zeros(self.num_layers, batch, size, self.num_heads, head_dim, **how)


class CrossAttention(nn.Module):
    """Multi-head attention from tokens to all vectors of a source; the keys have no bias."""

    config: WhisperDecoderConfig

    def setup(self):
        c = self.config
        inner, names = (c.num_heads, c.hidden_size // c.num_heads), ("embed", "heads", "head_dim")
        dtype = jnp.dtype(c.dtype)
        self.q = Linear(inner, names, use_bias=True, dtype=dtype)
        self.k = Linear(inner, names, dtype=dtype)
        self.v = Linear(inner, names, use_bias=True, dtype=dtype)
        self.out = Linear((c.hidden_size,), (*names[1:], "embed"), in_ndim=2, use_bias=True, dtype=dtype)

    def keys_values(self, source):
        """Maps [B, S, E] to keys and values [B, S, N, H]."""
        return self.k(source), self.v(source)

    def __call__(self, x, keys_values):
        """Maps [B, T, E] to ([B, T, E], the queries [B, T, N, H])."""
        q = constrain(self.q(x), "batch", "seq", "heads", "head_dim")
        k, v = (each.astype(q.dtype) for each in keys_values)
        return self.out(constrain(attention(q, k, v), "batch", "seq", "heads", "head_dim")), q


class WhisperDecoderLayer(nn.Module):
    """Causal self-attention, cross-attention to the source, MLP, each after a norm."""

    config: WhisperDecoderConfig

    @nn.compact
    def __call__(self, x, layer_cache, segments, source, cache_position):
        """Applies the layer; without x, only computes the keys and values of the source.

        Args:
            layer_cache: None, or (keys, values, cross keys, cross values).
            source: [B, S, E] from the encoder, not read with a cache.
            cache_position: None, or (segments of the cache, index of x in it).

        Returns:
            (x, (the keys and values of the layer's cache, the queries to the source)); without x, (None, keys and
            values).
        """
        c = self.config
        dtype = jnp.dtype(c.dtype)
        cross = CrossAttention(c, name="cross_attention")
        if x is None:
            return None, cross.keys_values(source)
        cache = None if layer_cache is None else (*layer_cache[:2], *cache_position)
        h = LayerNorm(NORM_EPS, dtype, name="attention_norm")(x)
        own = Attention(c.num_heads, mask="causal", k_bias=False, dtype=dtype, name="attention")
        h, written = own(h, segments=segments, cache=cache)
        x = x + h
        h = LayerNorm(NORM_EPS, dtype, name="cross_attention_norm")(x)
        h, queries = cross(h, cross.keys_values(source) if layer_cache is None else layer_cache[2:])
        x = x + h
        h = LayerNorm(NORM_EPS, dtype, name="mlp_norm")(x)
        x = x + MLP(c.mlp_size, c.activation, dtype=dtype, name="mlp")(h)
        return constrain(x, "batch", "seq", None), (written, queries)


class WhisperDecoder(nn.Module):
    """The decoder from tokens and an encoded source to logits (reference: the decoder of `WhisperModel`, and its head).

    Training calls the module with a source. Generation calls `start` on the source once, and then the module with the
    cache.
    """

    config: WhisperDecoderConfig

    def setup(self):
        c = self.config
        dtype = jnp.dtype(c.dtype)
        self.token_embedding = Embedding(c.vocab_size, c.hidden_size, dtype=dtype)
        self.position_embedding = Embedding(c.max_position_embeddings, c.hidden_size, (None, "embed"), dtype=dtype)
        self.layers = layers_of(c, WhisperDecoderLayer, 3)(c)
        self.final_norm = LayerNorm(NORM_EPS, dtype)
        if not c.tie_word_embeddings:
            self.lm_head = Linear((c.vocab_size,), ("embed", "vocab"), dtype=dtype)

    def embed(self, tokens):
        """Maps int[B, T] to dtype[B, T, E], without positions."""
        return self.token_embedding(tokens)

    def start(self, source, size: int) -> CrossCache:
        """Returns a cache with each layer's keys and values of a source [B, S, E], and room for `size` tokens."""
        keys, values = self.layers(None, None, None, source, None)[1]
        cache = self.config.make_cache(source.shape[0], size, source.shape[1])
        return cache.replace(cross_keys=keys, cross_values=values)

    def __call__(
        self,
        tokens,
        positions=None,
        segments=None,
        *,
        source=None,
        cache: CrossCache | None = None,
        logits_at=None,
        heads: Sequence[tuple[int, int]] = (),
        project: bool = True,
    ):
        """Computes the logits of the token that follows each position.

        Args:
            tokens: int[B, T], beginning with `decoder_start_token_id`.
            positions: int[B, T]; None counts from 0, or from the cache's length.
            segments: int[B, T]; a token sees only its own segment, 0 is padding; None is one segment.
            source: dtype[B, S, E], the encoded source, of which all vectors are seen; not read with a cache.
            cache: of `start`, to read from and add to.
            logits_at: int[B, M], the positions of the returned logits; None returns all.
            heads: (layer, head) pairs whose attention to the source is returned too; they need a cache.
            project: False stops before the head and returns HeadInputs instead of logits.

        Returns:
            float32[B, T or M, V]; with a cache (logits, cache); with heads (logits, cache, float32[B, heads, T, S]
            probabilities). Logits are NaN for a position beyond the learned ones.

        Raises:
            ConfigError: neither or both of source and cache, heads without a cache or out of range, or no `positions`
                and more tokens than learned positions.
        """
        self._check(tokens, positions, source, cache, heads)
        c = self.config
        if cache is not None and segments is None:
            segments = jnp.ones(tokens.shape, jnp.int32)
        if positions is None:
            start = jnp.zeros((tokens.shape[0], 1), jnp.int32) if cache is None else cache.length[:, None]
            positions = start + jnp.arange(tokens.shape[1])[None]
        # The positions of padding may exceed the table.
        counted = positions if segments is None else jnp.where(segments > 0, positions, 0)
        x = constrain(self.embed(tokens) + self.position_embedding(counted), "batch", "seq", None)
        layer_caches, cache_position = None, None
        if cache is not None:
            cache, index = cache.reserve(segments, positions)
            layer_caches = cache.keys, cache.values, cache.cross_keys, cache.cross_values
            cache_position = cache.segments, index
        x, (written, queries) = self.layers(x, layer_caches, segments, source, cache_position)
        if logits_at is not None:
            x = jnp.take_along_axis(x, logits_at[..., None], axis=1)
        x = self.final_norm(x)
        if not project:
            return head_inputs(x, self.token_embedding, None if c.tie_word_embeddings else self.lm_head)
        logits = self.token_embedding.attend(x) if c.tie_word_embeddings else self.lm_head(x)
        logits = constrain(logits.astype(jnp.float32), "batch", "seq", "vocab")
        if cache is None:
            return logits
        cache = cache.replace(keys=written[0], values=written[1])
        return (logits, cache, _probabilities(queries, cache.cross_keys, heads)) if heads else (logits, cache)

    def _check(self, tokens, positions, source, cache, heads):
        c = self.config
        if (source is None) == (cache is None) or (heads and cache is None):
            given = [
                name
                for name, value in dict(source=source, cache=cache, heads=heads or None).items()
                if value is not None
            ]
            raise ConfigError(
                f"Whisper decoder with {' and '.join(given) or 'neither source nor cache'}",
                "a source, or a cache of `start`; heads with a cache",
                "pass one of them",
            )
        if wrong := [pair for pair in heads if not (0 <= pair[0] < c.num_layers and 0 <= pair[1] < c.num_heads)]:
            raise ConfigError(
                f"Whisper decoder: attention of (layer, head) {wrong[0]}",
                f"layers below {c.num_layers} and heads below {c.num_heads}",
                "take the alignment heads of this model's own generation_config.json",
            )
        if positions is None and tokens.shape[1] > c.max_position_embeddings:
            raise ConfigError(
                f"Whisper decoder: {tokens.shape[1]} tokens",
                f"at most {c.max_position_embeddings} positions",
                "shorten the text",
            )


def _probabilities(queries, keys, heads: Sequence[tuple[int, int]]) -> jax.Array:
    """Returns float32[B, A, T, S] of A heads, from queries [L, B, T, N, H] and keys [L, B, S, N, H] of all layers."""
    q, k = (jnp.stack([x[layer, :, :, head] for layer, head in heads], axis=1) for x in (queries, keys))
    scores = jnp.einsum("bath,bash->bats", q * q.shape[-1] ** -0.5, k, preferred_element_type=jnp.float32)
    return jax.nn.softmax(scores, axis=-1)


# ---- Hugging Face folders

DECODER_FIELDS: Fields = {
    "vocab_size": ("vocab_size", "size", WhisperDecoderConfig.vocab_size),
    "hidden_size": ("d_model", "size", WhisperDecoderConfig.hidden_size),
    "num_layers": ("decoder_layers", "size", WhisperDecoderConfig.num_layers),
    "num_heads": ("decoder_attention_heads", "size", WhisperDecoderConfig.num_heads),
    "mlp_size": ("decoder_ffn_dim", "size", WhisperDecoderConfig.mlp_size),
    "activation": ("activation_function", "activation", ACTIVATIONS, "gelu"),
    "max_position_embeddings": ("max_target_positions", "size", WhisperDecoderConfig.max_position_embeddings),
    "tie_word_embeddings": ("tie_word_embeddings", "flag", True),
    "bos_token_id": ("bos_token_id", "id"),
    "eos_token_id": ("eos_token_id", "ids"),
    "pad_token_id": ("pad_token_id", "id"),
    "decoder_start_token_id": ("decoder_start_token_id", "id", WhisperDecoderConfig.decoder_start_token_id),
}


def decoder_table(config: WhisperDecoderConfig, layer_weights: Sequence[Weight]) -> Table:
    """Returns the table of the decoder's weights, without the head.

    Args:
        layer_weights: those that its layers have in common with the encoder's.
    """
    c = config
    head = c.hidden_size // c.num_heads
    cross = "layers.{layer}.encoder_attn"
    weights = [
        Weight("embed_tokens.weight", "token_embedding/embedding"),
        Weight("embed_positions.weight", "position_embedding/embedding"),
        *layer_weights,
        *norm(f"{cross}_layer_norm", "layers/cross_attention_norm"),
        *into_heads(
            [f"{cross}.{part}_proj" for part in "qkv"],
            "layers/cross_attention",
            head,
            (c.hidden_size,) * 3,
            biased="qv",
        ),
        *linear(f"{cross}.out_proj", "layers/cross_attention/out", OUT_OF_HEADS, {"h": head}),
        *norm("layer_norm", "final_norm"),
    ]
    return Table(tuple(weights))
