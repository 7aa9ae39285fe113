"""Pre-norm decoder-only transformer of the LLaMA kind: RMSNorm, RoPE, grouped-query attention, gated MLP."""

from __future__ import annotations

from dataclasses import dataclass

import jax.numpy as jnp
from flax import linen as nn

from mllm_jax.errors import ConfigError
from mllm_jax.layers.attention import Attention
from mllm_jax.layers.linear import Embedding, Linear
from mllm_jax.layers.mlp import MLP
from mllm_jax.layers.norms import RMSNorm
from mllm_jax.layers.rotary import rotary_angles
from mllm_jax.layers.stack import scan_layers
from mllm_jax.llms.cache import KVCache
from mllm_jax.sharding.logical import constrain


@dataclass(frozen=True)
class DecoderConfig:
    """Sizes and switches of a decoder.

    Attributes:
        head_dim: None is hidden_size / num_heads.
        gated, activation: True and "silu" are SwiGLU.
        tie_word_embeddings: the output head is the embedding's transpose.
        qkv_bias, qk_norm: as in Qwen2 and Qwen3.
        mimetic_init: for training from scratch on little data; see `Attention`.
    """

    vocab_size: int
    hidden_size: int = 256
    num_layers: int = 4
    num_heads: int = 4
    num_kv_heads: int = 2
    head_dim: int | None = None
    mlp_size: int = 688
    activation: str = "silu"
    gated: bool = True
    rope_theta: float = 10_000.0
    norm_eps: float = 1e-6
    tie_word_embeddings: bool = True
    qkv_bias: bool = False
    qk_norm: bool = False
    mimetic_init: bool = False
    dtype: str = "float32"
    remat: str = "none"
    scan_unroll: int = 1

    def __post_init__(self):
        if self.num_heads % self.num_kv_heads:
            raise ConfigError(
                f"decoder: {self.num_heads} heads, {self.num_kv_heads} key-value heads",
                "a number of heads that the key-value heads divide",
                "change num_heads or num_kv_heads",
            )
        if (self.head_dim or self.hidden_size // self.num_heads) % 2:
            raise ConfigError("decoder: an odd head_dim", "an even one: RoPE turns pairs", "change head_dim")

    def make(self) -> Decoder:
        return Decoder(self)

    def make_cache(self, batch: int, size: int) -> KVCache:
        """An empty cache for `batch` rows of at most `size` tokens."""
        head_dim = self.head_dim or self.hidden_size // self.num_heads
        return KVCache.zeros(self.num_layers, batch, size, self.num_kv_heads, head_dim, jnp.dtype(self.dtype))


class DecoderBlock(nn.Module):
    """One layer: attention, then MLP, each behind an RMSNorm and added to the stream."""

    config: DecoderConfig

    @nn.compact
    def __call__(self, x, layer_cache, segments, angles, cache_place):
        c = self.config
        dtype = jnp.dtype(c.dtype)
        out_std = 0.02 / (2 * c.num_layers) ** 0.5
        h = RMSNorm(c.norm_eps, dtype, name="attention_norm")(x)
        attention = Attention(
            c.num_heads,
            c.num_kv_heads,
            c.head_dim,
            mask="causal",
            qkv_bias=c.qkv_bias,
            out_bias=False,
            qk_norm=c.qk_norm,
            norm_eps=c.norm_eps,
            out_init_std=out_std,
            mimetic_init=c.mimetic_init,
            dtype=dtype,
            name="attention",
        )
        cache = None if layer_cache is None else (*layer_cache, *cache_place)
        h, written = attention(h, segments=segments, angles=angles, cache=cache)
        x = x + h
        h = RMSNorm(c.norm_eps, dtype, name="mlp_norm")(x)
        mlp = MLP(c.mlp_size, c.activation, c.gated, use_bias=False, out_init_std=out_std, dtype=dtype, name="mlp")
        return constrain(x + mlp(h), "batch", "seq", None), written


class Decoder(nn.Module):
    """Token or embedding rows to logits (reference class: `LlamaForCausalLM`)."""

    config: DecoderConfig

    def setup(self):
        c = self.config
        dtype = jnp.dtype(c.dtype)
        self.token_embedding = Embedding(c.vocab_size, c.hidden_size, dtype=dtype)
        self.layers = scan_layers(
            DecoderBlock, num_layers=c.num_layers, remat=c.remat, unroll=c.scan_unroll, num_broadcast=3
        )(c)
        self.final_norm = RMSNorm(c.norm_eps, dtype)
        if not c.tie_word_embeddings:
            self.lm_head = Linear((c.vocab_size,), ("embed", "vocab"), dtype=dtype)

    def embed(self, tokens):
        """int[B, S] -> dtype[B, S, E]"""
        return self.token_embedding(tokens)

    def __call__(self, tokens, positions=None, segments=None, *, embeddings=None, cache=None):
        """Logits for the token that follows each place.

        Args:
            tokens: int[B, S] (not read when embeddings are given).
            positions: int[B, S] rotary positions; None counts 0..S-1, or on from the cache's length.
            segments: int[B, S]; a token sees its own segment only, 0 is padding; None is one segment.
            embeddings: dtype[B, S, E] in the place of embedded tokens: this is how media enter.
            cache: KVCache to read from and add to.

        Returns:
            float32[B, S, V], with a cache (logits, cache).
        """
        c = self.config
        x = self.embed(tokens) if embeddings is None else embeddings
        if cache is not None and segments is None:
            segments = jnp.ones(x.shape[:2], jnp.int32)
        if positions is None:
            start = jnp.zeros((x.shape[0], 1), jnp.int32) if cache is None else cache.length[:, None]
            positions = start + jnp.arange(x.shape[1])[None]
        angles = rotary_angles(positions, c.head_dim or c.hidden_size // c.num_heads, c.rope_theta)
        x = constrain(x, "batch", "seq", None)
        layer_caches, place = None, None
        if cache is not None:
            cache, index = cache.reserve(segments)
            layer_caches, place = (cache.keys, cache.values), (cache.segments, index)
        x, written = self.layers(x, layer_caches, segments, angles, place)
        x = self.final_norm(x)
        logits = self.token_embedding.attend(x) if c.tie_word_embeddings else self.lm_head(x)
        logits = constrain(logits.astype(jnp.float32), "batch", "seq", "vocab")
        if cache is None:
            return logits
        return logits, cache.replace(keys=written[0], values=written[1])
