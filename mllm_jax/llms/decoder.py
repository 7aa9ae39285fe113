"""The decoder-only transformer: one module, whose options make it LLaMA, Mistral, Qwen, GLM, OPT or GPT-2."""

from __future__ import annotations

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from flax import linen as nn

from mllm_jax.errors import ConfigError
from mllm_jax.layers.attention import Attention
from mllm_jax.layers.compute import WithCompute
from mllm_jax.layers.head import head_inputs
from mllm_jax.layers.linear import Embedding, Linear
from mllm_jax.layers.mlp import ACTIVATIONS, MLP
from mllm_jax.layers.norms import LayerNorm, RMSNorm
from mllm_jax.layers.requirements import Requirements
from mllm_jax.layers.rotary import RopeScaling, mrope_parts, rotary_angles
from mllm_jax.layers.stack import layers_of
from mllm_jax.llms.cache import KVCache
from mllm_jax.sharding.logical import constrain

LAYER_TYPES = ("full_attention", "sliding_attention")


@dataclass(frozen=True)
class DecoderDialect:
    """Details that distinguish the families of decoders; the defaults are LLaMA's.

    Attributes:
        gated: whether the MLP is gated; with activation "silu" it is SwiGLU.
        norm: "rms" or "layer"; norm_affine False is a LayerNorm without scale and bias; all norms have norm_eps.
        norm_first: whether norms come before attention and MLP; False puts them after each sum (OPT-350m).
        final_norm: a norm before the output head.
        positions: "rotary", or "learned": a table of max_position_embeddings + position_offset vectors, added to the
            embedded tokens; the first position is row `position_offset`.
        rope_scaling, rope_theta, partial_rotary_factor, rotary_interleaved: see `RopeScaling` and `apply_rotary`; the
            first `partial_rotary_factor` of each head's dimensions are rotated.
        mrope_sections: numbers of pairs of a head's dimensions that time, height and width rotate, in this order
            (M-RoPE, arXiv 2409.12191); empty: a position is a single number.
        mrope_interleaved: whether the pairs alternate, time, height, width, time, ..., until a section is used up
            (Qwen3-VL).
        embedding_size: width of embedding and head if it is not hidden_size; linear maps connect the two widths.
        qkv_bias, out_bias, mlp_bias: whether the layers' linear maps have biases.
        sliding_window: None, or the number of keys that a query sees, its own included.
        layer_types: "full_attention" or "sliding_attention" of each layer; empty: every layer has the sliding window.
        longest: None, or the most tokens of a text: longer ones need code of the family that is not implemented here.
        family: the Hugging Face architecture of the saved folder.
    """

    gated: bool = True
    norm: str = "rms"
    norm_affine: bool = True
    norm_eps: float = 1e-6
    norm_first: bool = True
    final_norm: bool = True
    positions: str = "rotary"
    position_offset: int = 0
    rope_theta: float = 10_000.0
    rope_scaling: RopeScaling = RopeScaling()
    partial_rotary_factor: float = 1.0
    rotary_interleaved: bool = False
    mrope_sections: tuple[int, ...] = ()
    mrope_interleaved: bool = False
    embedding_size: int | None = None
    qkv_bias: bool = False
    out_bias: bool = False
    mlp_bias: bool = False
    sliding_window: int | None = None
    layer_types: tuple[str, ...] = ()
    longest: int | None = None
    family: str = "LlamaForCausalLM"


@dataclass(frozen=True)
class DecoderConfig(WithCompute):
    """Sizes of a decoder; details that only reproduce a family are in its dialect.

    Attributes:
        head_dim: None is hidden_size / num_heads.
        qk_norm: whether a norm follows each head's queries and keys.
        mimetic_init: whether to initialise for training from scratch on little data; see `Attention`.
        tie_word_embeddings: whether the output head is the transposed embedding.
        max_position_embeddings: the length of the training texts; only learned positions are limited to it.
        bos_token_id, eos_token_id, pad_token_id: read by generation; each of several eos ids ends a text.
    """

    vocab_size: int
    hidden_size: int = 256
    num_layers: int = 4
    num_heads: int = 4
    num_kv_heads: int = 2
    head_dim: int | None = None
    mlp_size: int = 688
    activation: str = "silu"
    qk_norm: bool = False
    mimetic_init: bool = False
    tie_word_embeddings: bool = True
    max_position_embeddings: int = 2048
    bos_token_id: int | None = None
    eos_token_id: tuple[int, ...] = ()
    pad_token_id: int | None = None
    dialect: DecoderDialect = DecoderDialect()

    def __post_init__(self):
        dialect = self.dialect
        require = Requirements("decoder", self)
        require.one_of("dialect.norm", ("rms", "layer"))
        require.one_of("dialect.positions", ("rotary", "learned"))
        require.one_of("activation", ACTIVATIONS)
        require.kv_heads(self.num_heads, self.num_kv_heads)
        require(
            dialect.norm == "layer" or dialect.norm_affine,
            "RMSNorm without scale",
            "dialect.norm_affine",
            "use dialect.norm='layer'",
        )
        require(
            dialect.positions == "learned" or 0 < self.rotary_dim + self.rotary_dim % 2 <= self.size_per_head,
            f"an odd head_dim, {self.size_per_head}, of which RoPE rotates {self.rotary_dim} dimensions",
            "an even head_dim: RoPE rotates pairs",
            "change head_dim or dialect.partial_rotary_factor",
        )
        require(
            not dialect.mrope_sections
            or (len(dialect.mrope_sections) == 3 and 2 * sum(dialect.mrope_sections) == self.rotary_dim),
            f"dialect.mrope_sections {dialect.mrope_sections} of {self.rotary_dim // 2} pairs of rotated dimensions",
            "three numbers with that sum",
            "change dialect.mrope_sections",
        )
        require(
            not dialect.mrope_sections or (dialect.positions == "rotary" and dialect.rope_scaling.kind != "dynamic"),
            f"dialect.mrope_sections with {dialect.positions} positions and {dialect.rope_scaling.kind} scaling",
            "rotary positions with a scaling that does not depend on the length of the text",
            "leave out dialect.mrope_sections, or change the scaling",
        )
        require(
            not dialect.layer_types
            or (len(dialect.layer_types) == self.num_layers and set(dialect.layer_types) <= set(LAYER_TYPES)),
            f"dialect.layer_types {dialect.layer_types} for {self.num_layers} layers",
            f"one of {', '.join(LAYER_TYPES)} for each layer",
            "change dialect.layer_types",
        )
        require(
            dialect.sliding_window is not None or "sliding_attention" not in dialect.layer_types,
            "layers with sliding attention and no dialect.sliding_window",
            "the window's size",
            "set dialect.sliding_window",
        )

    @property
    def size_per_head(self) -> int:
        """The dimensions of a head, also if head_dim is None."""
        return self.head_dim or self.hidden_size // self.num_heads

    @property
    def rotary_dim(self) -> int:
        """The number of rotated dimensions of a head; an odd number counts as one more."""
        return int(self.size_per_head * self.dialect.partial_rotary_factor)

    @property
    def windows(self) -> tuple[int | None, ...]:
        """The sliding window of each layer; None is full attention."""
        kinds = self.dialect.layer_types or ("sliding_attention",) * self.num_layers
        return tuple(self.dialect.sliding_window if kind == "sliding_attention" else None for kind in kinds)

    @property
    def family(self) -> str:
        """The Hugging Face architecture of the saved folder."""
        return self.dialect.family

    encoder_decoder = False  # see `mllm_jax.llms.protocol`

    def make(self) -> Decoder:
        return Decoder(self)

    def make_cache(self, batch: int, size: int) -> KVCache:
        """Returns an empty cache for `batch` rows of at most `size` tokens."""
        return KVCache.zeros(self.num_layers, batch, size, self.num_kv_heads, self.size_per_head, jnp.dtype(self.dtype))


def _norm(c: DecoderConfig, **names) -> nn.Module:
    dialect = c.dialect
    if dialect.norm == "rms":
        return RMSNorm(dialect.norm_eps, jnp.dtype(c.dtype), **names)
    return LayerNorm(dialect.norm_eps, jnp.dtype(c.dtype), dialect.norm_affine, **names)


class DecoderBlock(nn.Module):
    """Transformer layer: attention, then MLP, each with its norm and a residual connection."""

    config: DecoderConfig

    @nn.compact
    def __call__(self, x, own, segments, angles, cache_position, deepstack=None):
        """Applies the layer; `own` is (cache or None, window or None if all layers have one, layer number)."""
        c, dialect = self.config, self.config.dialect
        dtype = jnp.dtype(c.dtype)
        out_std = 0.02 / (2 * c.num_layers) ** 0.5
        layer_cache, window, number = own
        attention_norm, mlp_norm = _norm(c, name="attention_norm"), _norm(c, name="mlp_norm")
        attention = Attention(
            c.num_heads,
            c.num_kv_heads,
            c.head_dim,
            mask="causal",
            qkv_bias=dialect.qkv_bias,
            out_bias=dialect.out_bias,
            qk_norm=c.qk_norm,
            rotary_interleaved=dialect.rotary_interleaved,
            norm_eps=dialect.norm_eps,
            out_init_std=out_std,
            mimetic_init=c.mimetic_init,
            dtype=dtype,
            name="attention",
        )
        mlp = MLP(
            c.mlp_size,
            c.activation,
            dialect.gated,
            use_bias=dialect.mlp_bias,
            out_init_std=out_std,
            dtype=dtype,
            name="mlp",
        )
        h, written = attention(
            attention_norm(x) if dialect.norm_first else x,
            segments=segments,
            angles=angles,
            window=c.windows[0] if window is None else window,
            cache=None if layer_cache is None else (*layer_cache, *cache_position),
        )
        x = x + h
        if dialect.norm_first:
            x = x + mlp(mlp_norm(x))
        else:
            x = attention_norm(x)
            x = mlp_norm(x + mlp(x))
        if deepstack is not None:
            here = jax.lax.dynamic_index_in_dim(deepstack, jnp.minimum(number, len(deepstack) - 1), keepdims=False)
            x = x + jnp.where(number < len(deepstack), here.astype(dtype), 0)
        return constrain(x, "batch", "seq", None), written


class Decoder(nn.Module):
    """A decoder from tokens or embeddings to logits (reference classes: see the families' files)."""

    config: DecoderConfig

    def setup(self):
        c, dialect = self.config, self.config.dialect
        dtype = jnp.dtype(c.dtype)
        width = dialect.embedding_size or c.hidden_size
        self.token_embedding = Embedding(c.vocab_size, width, dtype=dtype)
        if dialect.embedding_size is not None:
            self.embedding_in = Linear((c.hidden_size,), (None, "embed"), dtype=dtype)
            self.embedding_out = Linear((width,), ("embed", None), dtype=dtype)
        if dialect.positions == "learned":
            rows = c.max_position_embeddings + dialect.position_offset
            self.position_embedding = Embedding(rows, c.hidden_size, (None, "embed"), dtype=dtype)
        self.layers = layers_of(c, DecoderBlock, 4)(c)
        if dialect.final_norm:
            self.final_norm = _norm(c)
        if not c.tie_word_embeddings:
            self.lm_head = Linear((c.vocab_size,), ("embed", "vocab"), dtype=dtype)

    def embed(self, tokens):
        """Maps int[B, S] to dtype[B, S, E], without positions."""
        x = self.token_embedding(tokens)
        return x if self.config.dialect.embedding_size is None else self.embedding_in(x)

    def __call__(
        self,
        tokens,
        positions=None,
        segments=None,
        *,
        embeddings=None,
        deepstack=(),
        cache=None,
        logits_at=None,
        project=True,
    ):
        """Computes the logits of the token that follows each position.

        Args:
            tokens: int[B, S] (not read when embeddings are given).
            positions: int[B, S] counted in each text, or int[B, S, 3], time, height and width, for M-RoPE; None counts
                from 0, or from the next position of the cache.
            segments: int[B, S]; a token sees only its own segment, 0 is padding; None is one segment.
            embeddings: dtype[B, S, E], used instead of the embedded tokens; media enter this way.
            deepstack: dtype[B, S, E] each; the n-th is added to the output of the n-th layer.
            cache: KVCache to read from and add to.
            logits_at: int[B, M], the positions of the returned logits; None returns all.
            project: False stops before the head and returns HeadInputs instead of logits.

        Returns:
            float32[B, S or M, V] or HeadInputs; with a cache (the same, cache). Logits are NaN for a position beyond
            the learned ones or beyond `longest`.

        Raises:
            ConfigError: no `positions`, and more tokens than learned positions or `longest`.
        """
        c, dialect = self.config, self.config.dialect
        x = self.embed(tokens) if embeddings is None else embeddings
        if cache is not None and segments is None:
            segments = jnp.ones(x.shape[:2], jnp.int32)
        if positions is None:
            start = jnp.zeros((x.shape[0], 1), jnp.int32) if cache is None else (cache.length + cache.offset)[:, None]
            positions = start + jnp.arange(x.shape[1])[None]
            bound = c.max_position_embeddings if dialect.positions == "learned" else dialect.longest
            if bound is not None and x.shape[1] > bound:
                raise ConfigError(
                    f"decoder: {x.shape[1]} tokens",
                    f"at most {bound} positions",
                    "shorten the text",
                )
        if dialect.longest is not None:
            beyond = positions >= dialect.longest
            beyond = beyond if segments is None else beyond & (segments > 0)
            x = jnp.where(beyond[..., None], jnp.nan, x)
        angles = None
        if dialect.positions == "learned":
            # The positions of padding may exceed the table.
            counted = positions if segments is None else jnp.where(segments > 0, positions, 0)
            x = x + self.position_embedding(counted + dialect.position_offset)
        else:
            length = _text_length(positions, segments) if dialect.rope_scaling.kind == "dynamic" else None
            parts = mrope_parts(dialect.mrope_sections, dialect.mrope_interleaved) if positions.ndim == 3 else None
            angles = rotary_angles(positions, c.rotary_dim, dialect.rope_theta, dialect.rope_scaling, length, parts)
        x = constrain(x, "batch", "seq", None)
        layer_caches, cache_position = None, None
        if cache is not None:
            cache, index = cache.reserve(segments, positions)
            layer_caches, cache_position = (cache.keys, cache.values), (cache.segments, index)
        windows = None
        if len(set(c.windows)) > 1:
            windows = jnp.array([jnp.iinfo(jnp.int32).max if w is None else w for w in c.windows], jnp.int32)
        stacked, numbers = (jnp.stack(deepstack), jnp.arange(c.num_layers)) if deepstack else (None, None)
        x, written = self.layers(x, (layer_caches, windows, numbers), segments, angles, cache_position, stacked)
        if logits_at is not None:
            x = jnp.take_along_axis(x, logits_at[..., None], axis=1)
        if dialect.final_norm:
            x = self.final_norm(x)
        if dialect.embedding_size is not None:
            x = self.embedding_out(x)
        if project:
            out = self.token_embedding.attend(x) if c.tie_word_embeddings else self.lm_head(x)
            out = constrain(out.astype(jnp.float32), "batch", "seq", "vocab")
        else:
            out = head_inputs(x, self.token_embedding, None if c.tie_word_embeddings else self.lm_head)
        if cache is None:
            return out
        return out, cache.replace(keys=written[0], values=written[1])


def _text_length(positions: jax.Array, segments: jax.Array | None) -> jax.Array:
    """Returns int[B, S]: one more than the largest position of each token's own text."""
    if segments is None:
        return jnp.broadcast_to(positions.max(axis=1, keepdims=True) + 1, positions.shape)
    same = segments[:, :, None] == segments[:, None, :]
    return jnp.where(same, positions[:, None, :], 0).max(axis=2) + 1
