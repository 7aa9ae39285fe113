"""Whisper's decoder (arXiv 2212.04356): a language model that attends to an encoded source, with learned positions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import jax
import jax.numpy as jnp
from einops import rearrange
from flax import linen as nn
from flax import struct

from mllm_jax.checkpoints.config_json import Fields
from mllm_jax.checkpoints.config_options import ACTIVATIONS
from mllm_jax.checkpoints.table import OUT_OF_HEADS, Table, Weight, into_heads, linear, norm
from mllm_jax.errors import ConfigError
from mllm_jax.layers.attention import attention
from mllm_jax.layers.compute import WithCompute
from mllm_jax.layers.context_attention import visible
from mllm_jax.layers.head import head_inputs
from mllm_jax.layers.linear import Embedding, Linear
from mllm_jax.layers.mlp import MLP
from mllm_jax.layers.norms import LayerNorm
from mllm_jax.layers.requirements import Requirements
from mllm_jax.layers.stack import layers_of
from mllm_jax.llms.cache import KVCache
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

    def make_cache(self, batch: int, size: int, source: int = 1) -> WhisperCache:
        """Returns an empty cache for at most `size` tokens and a source of `source` vectors, which `start` adds."""
        held, names = (
            (self.num_heads, self.hidden_size // self.num_heads),
            ("layers", "batch", "heads", "head_dim", None),
        )
        dtype = jnp.dtype(self.dtype)
        keys, cross = (constrain(jnp.zeros((self.num_layers, batch, *held, n), dtype), *names) for n in (size, source))
        none = jnp.zeros((batch,), jnp.int32)
        return WhisperCache(keys, keys, jnp.zeros((batch, size), jnp.int32), none, none, cross, cross)


@struct.dataclass
class WhisperCache(KVCache):
    """The keys and values of the decoded tokens and of the source.

    Time is the last axis: on a CPU, one token of several rows attends to a long source in a thirtieth of the time that
    it takes with time before the heads.

    keys, values: dtype[L, B, N, H, T]; cross_keys, cross_values: dtype[L, B, N, H, S], computed once.
    """

    cross_keys: jax.Array
    cross_values: jax.Array

    shared: ClassVar[tuple[str, ...]] = ("cross_keys", "cross_values")

    def grown(self, size: int) -> WhisperCache:
        """Returns the cache with room for `size` tokens, at least as many as it has."""
        more = size - self.segments.shape[1]
        wider = lambda x: jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, more)])  # noqa: E731
        return self.replace(keys=wider(self.keys), values=wider(self.values), segments=wider(self.segments))


class WhisperAttention(nn.Module):
    """Multi-head attention from tokens to given keys and values; the keys have no bias."""

    config: WhisperDecoderConfig

    def setup(self):
        c = self.config
        inner, names = (c.num_heads, c.hidden_size // c.num_heads), ("embed", "heads", "head_dim")
        dtype = jnp.dtype(c.dtype)
        self.q = Linear(inner, names, use_bias=True, dtype=dtype)
        self.k = Linear(inner, names, dtype=dtype)
        self.v = Linear(inner, names, use_bias=True, dtype=dtype)
        self.out = Linear((c.hidden_size,), (*names[1:], "embed"), in_ndim=2, use_bias=True, dtype=dtype)

    def keys_values(self, x):
        """Maps [B, S, E] to keys and values [B, S, N, H]."""
        return self.k(x), self.v(x)

    def __call__(self, x, keys_values, **where):
        """Maps [B, T, E] to [B, T, E]; `where` holds arguments of `attention`."""
        q = constrain(self.q(x), "batch", "seq", "heads", "head_dim")
        return self.out(constrain(attention(q, *keys_values, **where), "batch", "seq", "heads", "head_dim"))

    def from_cache(self, x, keys, values, seen=None):
        """Attends to cached keys and values.

        Args:
            x: [B, T, E].
            keys, values: [B, N, H, S]; or of fewer rows, if each is of several beams, which are one after another.
            seen: bool[B, 1, T, S], the keys that a token sees; None is all.

        Returns:
            ([B, T, E], the scaled queries [B, T, N, H]).
        """
        q = constrain(self.q(x), "batch", "seq", "heads", "head_dim")
        q, keys, values = q * q.shape[-1] ** -0.5, keys.astype(q.dtype), values.astype(q.dtype)
        beams = q.shape[0] // keys.shape[0]
        asked = rearrange(q, "(b k) t n h -> b (k t) n h", k=beams)
        scores = jnp.einsum("btnh,bnhs->bnts", asked, keys, preferred_element_type=jnp.float32)
        if seen is not None:
            scores = jnp.where(seen, scores, jnp.finfo(jnp.float32).min)
        weights = jax.nn.softmax(scores, axis=-1)
        y = jnp.einsum("bnts,bnhs->btnh", weights.astype(q.dtype), values)
        y = rearrange(y, "b (k t) n h -> (b k) t n h", k=beams)
        return self.out(constrain(y, "batch", "seq", "heads", "head_dim")), q


class WhisperDecoderLayer(nn.Module):
    """Causal self-attention, cross-attention to the source, MLP, each after a norm."""

    config: WhisperDecoderConfig

    @nn.compact
    def __call__(self, x, layer_cache, segments, source, place):
        """Applies the layer; without x, only computes the keys and values of the source.

        Args:
            layer_cache: None, or (keys, values, cross keys, cross values).
            source: [B, S, E] from the encoder, not read with a cache.
            place: None, or (index of x in the cache, which entries of the cache each token sees).

        Returns:
            (x, (keys, values, queries to the source)): of a cache, else None; without x, of the source.
        """
        c = self.config
        dtype = jnp.dtype(c.dtype)
        own, cross = WhisperAttention(c, name="attention"), WhisperAttention(c, name="cross_attention")
        if x is None:
            return None, (*map(_time_last, cross.keys_values(source)), None)
        keys = values = queries = None
        h = LayerNorm(NORM_EPS, dtype, name="attention_norm")(x)
        new = own.keys_values(h)
        if layer_cache is None:
            x = x + own(h, new, mask="causal", q_segments=segments, k_segments=segments)
        else:
            keys, values = (_write(*pair, place[0]) for pair in zip(layer_cache[:2], new, strict=True))
            x = x + own.from_cache(h, keys, values, place[1])[0]
        h = LayerNorm(NORM_EPS, dtype, name="cross_attention_norm")(x)
        if layer_cache is None:
            x = x + cross(h, cross.keys_values(source))
        else:
            h, queries = cross.from_cache(h, *layer_cache[2:])
            x = x + h
        h = LayerNorm(NORM_EPS, dtype, name="mlp_norm")(x)
        x = x + MLP(c.mlp_size, c.activation, dtype=dtype, name="mlp")(h)
        return constrain(x, "batch", "seq", None), (keys, values, queries)


def _time_last(x: jax.Array) -> jax.Array:
    return rearrange(x, "b s n h -> b n h s")


def _write(held: jax.Array, new: jax.Array, index: jax.Array) -> jax.Array:
    """Writes new [B, S, N, H] into held [B, N, H, T] at index int[B, S]; drops entries with an index past the end."""
    rows = jnp.arange(index.shape[0])[:, None]
    return held.at[rows, :, :, index].set(new.astype(held.dtype), mode="drop")


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

    def start(self, source, size: int) -> WhisperCache:
        """Returns a cache with each layer's keys and values of a source [B, S, E], and room for `size` tokens."""
        keys, values, _ = self.layers(None, None, None, source, None)[1]
        cache = self.config.make_cache(source.shape[0], size, source.shape[1])
        return cache.replace(cross_keys=keys, cross_values=values)

    def __call__(
        self,
        tokens,
        positions=None,
        segments=None,
        *,
        source=None,
        cache: WhisperCache | None = None,
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
        layer_caches = place = None
        if cache is not None:
            cache, index = cache.reserve(segments, positions)
            layer_caches = cache.keys, cache.values, cache.cross_keys, cache.cross_values
            held = jnp.arange(cache.segments.shape[1])[None]
            place = index, visible(True, index, segments, held, cache.segments, None)[:, 0]
        x, (keys, values, queries) = self.layers(x, layer_caches, segments, source, place)
        if logits_at is not None:
            x = jnp.take_along_axis(x, logits_at[..., None], axis=1)
        x = self.final_norm(x)
        if not project:
            return head_inputs(x, self.token_embedding, None if c.tie_word_embeddings else self.lm_head)
        logits = self.token_embedding.attend(x) if c.tie_word_embeddings else self.lm_head(x)
        logits = constrain(logits.astype(jnp.float32), "batch", "seq", "vocab")
        if cache is None:
            return logits
        cache = cache.replace(keys=keys, values=values)
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
    """Returns float32[B, A, T, S] of A heads, from scaled queries [L, B, T, N, H] and keys [L, B, N, H, S]."""
    q = jnp.stack([queries[layer, :, :, head] for layer, head in heads], axis=1)
    k = jnp.stack([keys[layer, :, head] for layer, head in heads], axis=1)
    scores = jnp.einsum("bath,bahs->bats", q, k.astype(q.dtype), preferred_element_type=jnp.float32)
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
