"""ChatGLM-6B, the first version (GLM-130B, arXiv 2210.02414): a prefix language model with two positions a token.

A text is a context and an answer. The context ends before the token `bos`, and each of its tokens sees all of it. The
answer is causal. The context holds a mark, gMASK or MASK; the answer has the mark's position.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from flax import struct

from mllm_jax.checkpoints.architectures import kind_of
from mllm_jax.checkpoints.config_json import Fields, read_fields, write_fields
from mllm_jax.checkpoints.config_options import ConfigOptions
from mllm_jax.checkpoints.table import OUT_OF_HEADS, Family, Table, Weight, head_by_head, linear, norm, token_sample
from mllm_jax.errors import ConfigError
from mllm_jax.layers.attention import attention, write_at
from mllm_jax.layers.compute import WithCompute
from mllm_jax.layers.head import head_inputs
from mllm_jax.layers.linear import Embedding, Linear
from mllm_jax.layers.mlp import MLP
from mllm_jax.layers.norms import LayerNorm
from mllm_jax.layers.requirements import Requirements
from mllm_jax.layers.rotary import apply_rotary
from mllm_jax.layers.stack import layers_of
from mllm_jax.llms.cache import KVCache
from mllm_jax.sharding.logical import constrain

# sqrt(2 L) of the released model, whose code has 28 layers here for any num_layers.
RESIDUAL_SCALE = (2 * 28) ** 0.5
FAR = np.iinfo(np.int32).max  # the index of a mark that a text does not have


@dataclass(frozen=True)
class ChatGLMConfig(WithCompute):
    """Sizes of a ChatGLM and the tokens that structure a text.

    Attributes:
        bos_token_id: the first token of the answer.
        gmask_token_id, mask_token_id: the marks; gMASK counts if a text has both.
        max_position_embeddings: the length of the training texts; longer texts are allowed.
    """

    vocab_size: int = 130528
    hidden_size: int = 4096
    num_layers: int = 28
    num_heads: int = 32
    mlp_size: int = 16384
    norm_eps: float = 1e-5
    max_position_embeddings: int = 2048
    bos_token_id: int = 130004
    eos_token_id: tuple[int, ...] = (130005,)
    pad_token_id: int | None = 3
    mask_token_id: int = 130000
    gmask_token_id: int = 130001
    family: str = "ChatGLMModel"

    def __post_init__(self):
        Requirements("ChatGLM", self).heads(4, "RoPE rotates pairs in each half")

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_heads

    encoder_decoder = False  # see `mllm_jax.llms.protocol`

    def make(self) -> ChatGLM:
        return ChatGLM(self)

    def make_cache(self, batch: int, size: int) -> PrefixCache:
        """Returns an empty cache for `batch` rows of at most `size` tokens."""
        kv = KVCache.zeros(self.num_layers, batch, size, self.num_heads, self.head_dim, jnp.dtype(self.dtype))
        return PrefixCache(
            **{field.name: getattr(kv, field.name) for field in fields(kv)},
            blocks=jnp.zeros((batch, size), jnp.int32),
            marks=jnp.full((batch, 3), FAR, jnp.int32),
        )


@struct.dataclass
class PrefixCache(KVCache):
    """The cache of one text a row; the context must come in one chunk, because each of its tokens sees all of it.

    blocks: int[B, T], the second position of each token, 0 in the context; marks: int[B, 3], the indices of bos, gMASK
    and MASK, FAR for each that has not been read.
    """

    blocks: jax.Array
    marks: jax.Array


def find_marks(config: ChatGLMConfig, tokens, text_index, segments) -> jax.Array:
    """Returns int[B, S, 3]: the indices of the first bos, gMASK and MASK of each token's text, FAR if it has none.

    Args:
        tokens: int[B, S].
        text_index: int[B, S], counted in each text.
        segments: int[B, S] or None.
    """
    ids = jnp.array([config.bos_token_id, config.gmask_token_id, config.mask_token_id])
    found = jnp.where(tokens[..., None] == ids, text_index[..., None], FAR)
    if segments is None:
        return jnp.broadcast_to(found.min(axis=1, keepdims=True), found.shape)
    same = segments[:, :, None] == segments[:, None, :]
    return jnp.stack([jnp.where(same, found[:, None, :, i], FAR).min(axis=2) for i in range(3)], axis=-1)


def two_positions(text_index: jax.Array, marks: jax.Array) -> jax.Array:
    """Returns each token's position in the context and its position in the answer.

    A token of the answer has the position of the mark in the context; without a mark, that of the last context token.
    A token of the context has position 0 in the answer. Without bos, the whole text is context.

    Args:
        text_index: int[B, S], counted in each text.
        marks: int[B, S, 3], see `find_marks`.

    Returns:
        int[B, 2, S].
    """
    bos, gmask, mask = (marks[..., i] for i in range(3))
    mark = jnp.where(gmask < FAR, gmask, jnp.where(mask < FAR, mask, bos - 1))
    context = text_index < bos
    return jnp.stack([jnp.where(context, text_index, mark), jnp.where(context, 0, text_index - bos + 1)], axis=1)


def rotary_angles_2d(positions: jax.Array, head_dim: int) -> tuple[jax.Array, jax.Array]:
    """Returns cosines and sines, float32[B, 2, S, head_dim/4], of int positions[B, 2, S]."""
    size = head_dim // 2
    frequencies = (1 / 10_000 ** (np.arange(0, size, 2, dtype=np.float32) / size)).astype(np.float32)
    # The model was trained with frequencies in half precision; exact ones change the angles of late tokens.
    frequencies = frequencies.astype(np.float16).astype(np.float32)
    angles = positions[..., None].astype(jnp.float32) * frequencies
    return jnp.cos(angles), jnp.sin(angles)


def apply_rotary_2d(x: jax.Array, angles: tuple[jax.Array, jax.Array]) -> jax.Array:
    """Rotates the first half of each head of x[B, S, N, H] by the first position and the second half by the second."""
    halves = jnp.split(x, 2, axis=-1)
    turned = [apply_rotary(half, tuple(a[:, i] for a in angles)) for i, half in enumerate(halves)]
    return jnp.concatenate(turned, axis=-1)


class ChatGLMBlock(nn.Module):
    """Transformer layer that adds attention and MLP to the normed and scaled stream, not to the stream itself."""

    config: ChatGLMConfig

    @nn.compact
    def __call__(self, x, layer_cache, segments, angles, bias, cache_position):
        """Maps [B, S, E] to ([B, S, E], the keys and values of the cache)."""
        c = self.config
        dtype = jnp.dtype(c.dtype)
        h = LayerNorm(c.norm_eps, dtype, name="attention_norm")(x)
        y, written = ChatGLMAttention(c, name="attention")(h, layer_cache, segments, angles, bias, cache_position)
        x = h * RESIDUAL_SCALE + y
        h = LayerNorm(c.norm_eps, dtype, name="mlp_norm")(x)
        x = h * RESIDUAL_SCALE + MLP(c.mlp_size, "gelu_tanh", dtype=dtype, name="mlp")(h)
        return constrain(x, "batch", "seq", None), written


class ChatGLMAttention(nn.Module):
    """Multi-head attention with two-dimensional RoPE; the mask is given as a bias."""

    config: ChatGLMConfig

    @nn.compact
    def __call__(self, x, layer_cache, segments, angles, bias, cache_position):
        c = self.config
        inner, names = (c.num_heads, c.head_dim), ("embed", "heads", "head_dim")
        common = dict(use_bias=True, dtype=jnp.dtype(c.dtype))
        q, k, v = (Linear(inner, names, **common, name=name)(x) for name in "qkv")
        q, k = apply_rotary_2d(constrain(q, "batch", "seq", "heads", "head_dim"), angles), apply_rotary_2d(k, angles)
        k_segments, written = segments, None
        if layer_cache is not None:
            k_segments, index = cache_position
            k, v = written = write_at(layer_cache[0], k, index), write_at(layer_cache[1], v, index)
        y = attention(q, k.astype(q.dtype), v.astype(q.dtype), q_segments=segments, k_segments=k_segments, bias=bias)
        y = constrain(y, "batch", "seq", "heads", "head_dim")
        return Linear((c.hidden_size,), (*names[1:], "embed"), in_ndim=2, **common, name="out")(y), written


class ChatGLM(nn.Module):
    """ChatGLM-6B from tokens or embeddings to logits (reference: the checkpoint's own code)."""

    config: ChatGLMConfig

    def setup(self):
        c = self.config
        dtype = jnp.dtype(c.dtype)
        self.token_embedding = Embedding(c.vocab_size, c.hidden_size, dtype=dtype)
        self.layers = layers_of(c, ChatGLMBlock, 4)(c)
        self.final_norm = LayerNorm(c.norm_eps, dtype)
        self.lm_head = Linear((c.vocab_size,), ("embed", "vocab"), dtype=dtype)

    def embed(self, tokens):
        """Maps int[B, S] to dtype[B, S, E]."""
        return self.token_embedding(tokens)

    def __call__(
        self, tokens, positions=None, segments=None, *, embeddings=None, cache=None, logits_at=None, project=True
    ):
        """Computes the logits of the token that follows each position.

        Args:
            tokens: int[B, S]; their bos, gMASK and MASK determine positions and mask, also if embeddings are given.
            positions: int[B, S], indices counted in each text; None counts them from 0, or from the cache's length. Or
                int[B, 2, S], both positions of each token, which replace those that the tokens determine.
            segments: int[B, S]; a token sees only its own segment, 0 is padding; None is one segment.
            embeddings: dtype[B, S, E], used instead of the embedded tokens; media enter this way.
            cache: PrefixCache to read from and add to.
            logits_at: int[B, M], the positions of the returned logits; None returns all.
            project: False stops before the head and returns HeadInputs instead of logits.

        Returns:
            float32[B, S, V] ([B, M, V]), with a cache (logits, cache).
        """
        x = constrain(self.embed(tokens) if embeddings is None else embeddings, "batch", "seq", None)
        layer_caches, cache_position = None, None
        if cache is None:
            index = jnp.arange(x.shape[1])[None]
            text_index = index if segments is None else index - _starts(segments)
        else:
            segments = jnp.ones(tokens.shape, jnp.int32) if segments is None else segments
            cache, index = cache.reserve(segments)
            text_index = index
            layer_caches, cache_position = (cache.keys, cache.values), (cache.segments, index)
        if positions is None or positions.ndim == 2:
            text_index = jnp.broadcast_to(text_index if positions is None else positions, tokens.shape)
            marks = find_marks(self.config, tokens, text_index, segments)
            if cache is not None:
                marks = jnp.minimum(marks, cache.marks[:, None])
                real = (segments > 0)[..., None]
                cache = cache.replace(marks=jnp.minimum(cache.marks, jnp.where(real, marks, FAR).min(axis=1)))
            positions = two_positions(text_index, marks)
        blocks = positions[:, 1]
        if cache is not None:
            blocks = write_at(cache.blocks, blocks, index)
            cache = cache.replace(blocks=blocks)
        # All tokens of a text see its context. Half of the least float stays finite when a score is added.
        seen = (blocks == 0)[:, None, :] | (index[:, :, None] >= jnp.arange(blocks.shape[1]))
        bias = jnp.where(seen, 0.0, 0.5 * jnp.finfo(jnp.float32).min)[:, None]
        angles = rotary_angles_2d(positions, self.config.head_dim)
        x, written = self.layers(x, layer_caches, segments, angles, bias, cache_position)
        x = self.final_norm(x)
        if logits_at is not None:
            x = jnp.take_along_axis(x, logits_at[..., None], axis=1)
        if not project:
            return head_inputs(x, self.token_embedding, self.lm_head)
        logits = constrain(self.lm_head(x).astype(jnp.float32), "batch", "seq", "vocab")
        return logits if cache is None else (logits, cache.replace(keys=written[0], values=written[1]))


def _starts(segments: jax.Array) -> jax.Array:
    """Returns int[B, S], the index at which each token's segment begins."""
    same = segments[:, :, None] == segments[:, None, :]
    return jnp.argmax(same, axis=2)


def is_v1(config: Mapping) -> bool:
    """Returns whether config.json of "ChatGLMModel" is ChatGLM-6B's: versions 2 and 3 name their sizes differently."""
    return "inner_hidden_size" in config or "position_encoding_2d" in config


_FIELDS: Fields = {
    "vocab_size": ("vocab_size", "size"),
    "hidden_size": ("hidden_size", "size"),
    "num_layers": ("num_layers", "size"),
    "num_heads": ("num_attention_heads", "size"),
    "mlp_size": ("inner_hidden_size", "size"),
    "max_position_embeddings": ("max_sequence_length", "size"),
    "bos_token_id": ("bos_token_id", "count"),
    "eos_token_id": ("eos_token_id", "ids", ...),
    "pad_token_id": ("pad_token_id", "count"),
    "mask_token_id": ("mask_token_id", "count"),
    "gmask_token_id": ("gmask_token_id", "count"),
    "norm_eps": ("layernorm_epsilon", "number", ..., 0.0),
}
_FIXED = dict(position_encoding_2d=True, quantization_bit=0, prefix_projection=False, tie_word_embeddings=False)


def from_hf_config(values: dict) -> ChatGLMConfig:
    """Reads config.json of ChatGLM-6B; sizes and token ids must be given, because releases differ in them.

    Raises:
        ConfigError: another version, an unsupported option, or a missing option.
    """
    if not is_v1(values):
        raise ConfigError(
            "config.json of a ChatGLM model without 'inner_hidden_size' and 'position_encoding_2d'",
            "the first ChatGLM-6B",
            "read it with mllm_jax.llms.glm: ChatGLM2 and ChatGLM3 are other models",
        )
    option = ConfigOptions(values, "config.json of ChatGLM-6B")
    for name, value in _FIXED.items():
        option.only(name, value)
    option.only("pre_seq_len", None, 0)
    config = ChatGLMConfig(**read_fields(option, _FIELDS))
    option.done()
    return config


def to_hf_config(config: ChatGLMConfig) -> dict:
    """Returns config.json of ChatGLM-6B, without the references to its code."""
    return kind_of(config.family) | _FIXED | dict(pre_seq_len=None) | write_fields(config, _FIELDS)


def table(config: ChatGLMConfig) -> Table:
    """Returns the table of ChatGLM-6B's weights; the fused tensor holds q, k and v head by head."""
    layer, heads = "transformer.layers.{layer}", {"n": config.num_heads}
    weights = [
        Weight("transformer.word_embeddings.weight", "token_embedding/embedding"),
        *norm(f"{layer}.input_layernorm", "layers/attention_norm"),
        *head_by_head(f"{layer}.attention.query_key_value", "layers/attention", heads),
        *linear(f"{layer}.attention.dense", "layers/attention/out", OUT_OF_HEADS, heads),
        *norm(f"{layer}.post_attention_layernorm", "layers/mlp_norm"),
        *linear(f"{layer}.mlp.dense_h_to_4h", "layers/mlp/up"),
        *linear(f"{layer}.mlp.dense_4h_to_h", "layers/mlp/down"),
        *norm("transformer.final_layernorm", "final_norm"),
        *linear("lm_head", "lm_head", bias=False),
    ]
    return Table(tuple(weights), ignored=(f"{layer}.attention.rotary_emb.inv_freq",))


FAMILIES = (
    Family(
        name="ChatGLM-6B",
        architectures=("ChatGLMModel", "ChatGLMForConditionalGeneration"),
        from_hf=from_hf_config,
        to_hf=to_hf_config,
        table=table,
        sample=token_sample,
        oracle="golden: the checkpoint's own code",
    ),
)
