"""The decoder-only transformer: one module, whose switches make it LLaMA, Mistral, Qwen, GLM or OPT."""

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
    """Details that make a decoder one of a family; the defaults are LLaMA's.

    Attributes:
        gated: True and activation "silu" are SwiGLU.
        norm: "rms" or "layer"; norm_affine False is a LayerNorm without scale and bias; norm_eps is of all norms.
        norm_first: norms before attention and MLP; False puts them after each sum (OPT-350m).
        final_norm: a norm before the output head.
        positions: "rotary", or "learned": a table of max_position_embeddings + position_offset vectors, added to the
            embedded tokens; the first position is row `position_offset`.
        rope_scaling, rope_theta, partial_rotary_factor, rotary_interleaved: see `RopeScaling` and `apply_rotary`; the
            first `partial_rotary_factor` of each head's dimensions are turned.
        mrope_sections: of three-part positions (M-RoPE, arXiv 2409.12191): how many pairs of a head's dimensions turn
            by time, height and width, one after the other; empty: positions are single numbers.
        mrope_interleaved: pairs take turns, time, height, width, time, ..., as long as the sections last (Qwen3-VL).
        embedding_size: width of embedding and head where it is not hidden_size; linear maps lead in and out.
        qkv_bias, out_bias, mlp_bias: of the layers' linear maps.
        sliding_window: None, or how many keys a query sees, itself included.
        layer_types: "full_attention" or "sliding_attention" of each layer; empty: the window, if any, is every layer's.
        longest: None, or how many tokens a text may have: beyond it the family's own code does what is not done here.
        family: the Hugging Face architecture that it is written as.
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
    """Sizes of a decoder; what only reproduces a family is in its dialect.

    Attributes:
        head_dim: None is hidden_size / num_heads.
        qk_norm: a norm of each head's queries and keys.
        mimetic_init: for training from scratch on little data; see `Attention`.
        tie_word_embeddings: the output head is the embedding's transpose.
        max_position_embeddings: the length it was trained on; a bound for learned positions only.
        bos_token_id, eos_token_id, pad_token_id: kept for generation; each of several eos ids ends a text.
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
            f"an odd head_dim, {self.size_per_head}, of which RoPE is to turn {self.rotary_dim}",
            "an even one: RoPE turns pairs",
            "change head_dim or dialect.partial_rotary_factor",
        )
        require(
            not dialect.mrope_sections
            or (len(dialect.mrope_sections) == 3 and 2 * sum(dialect.mrope_sections) == self.rotary_dim),
            f"dialect.mrope_sections {dialect.mrope_sections} of {self.rotary_dim // 2} pairs of dimensions that turn",
            "three numbers whose sum that is",
            "change dialect.mrope_sections",
        )
        require(
            not dialect.mrope_sections or (dialect.positions == "rotary" and dialect.rope_scaling.kind != "dynamic"),
            f"dialect.mrope_sections with {dialect.positions} positions and {dialect.rope_scaling.kind} scaling",
            "rotary positions whose scaling does not depend on the text's length",
            "leave out dialect.mrope_sections, or change the scaling",
        )
        require(
            not dialect.layer_types
            or (len(dialect.layer_types) == self.num_layers and set(dialect.layer_types) <= set(LAYER_TYPES)),
            f"dialect.layer_types {dialect.layer_types} for {self.num_layers} layers",
            f"as many of {', '.join(LAYER_TYPES)} as there are layers",
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
        """head_dim as it is used."""
        return self.head_dim or self.hidden_size // self.num_heads

    @property
    def rotary_dim(self) -> int:
        """How many dimensions of a head rotary positions turn; an odd number counts as one more."""
        return int(self.size_per_head * self.dialect.partial_rotary_factor)

    @property
    def windows(self) -> tuple[int | None, ...]:
        """The sliding window of each layer; None sees everything."""
        kinds = self.dialect.layer_types or ("sliding_attention",) * self.num_layers
        return tuple(self.dialect.sliding_window if kind == "sliding_attention" else None for kind in kinds)

    @property
    def family(self) -> str:
        """The architecture that it is written as."""
        return self.dialect.family

    encoder_decoder = False  # see `mllm_jax.llms.protocol`

    def make(self) -> Decoder:
        return Decoder(self)

    def make_cache(self, batch: int, size: int) -> KVCache:
        """An empty cache for `batch` rows of at most `size` tokens."""
        return KVCache.zeros(self.num_layers, batch, size, self.num_kv_heads, self.size_per_head, jnp.dtype(self.dtype))


def _norm(c: DecoderConfig, **names) -> nn.Module:
    dialect = c.dialect
    if dialect.norm == "rms":
        return RMSNorm(dialect.norm_eps, jnp.dtype(c.dtype), **names)
    return LayerNorm(dialect.norm_eps, jnp.dtype(c.dtype), dialect.norm_affine, **names)


class DecoderBlock(nn.Module):
    """One layer: attention, then MLP, each with its norm and added to the stream."""

    config: DecoderConfig

    @nn.compact
    def __call__(self, x, own, segments, angles, cache_place, deepstack=None):
        """`own` is what differs by layer: (cache or None, window or None, which is then every layer's, its number)."""
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
            cache=None if layer_cache is None else (*layer_cache, *cache_place),
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
    """Token or embedding rows to logits (reference classes: see the families' files)."""

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
        """int[B, S] -> dtype[B, S, E], without positions."""
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
        """Logits for the token that follows each place.

        Args:
            tokens: int[B, S] (not read when embeddings are given).
            positions: int[B, S] counted in each text, or int[B, S, 3], time, height and width, for M-RoPE; None counts
                0..S-1, or on from what the cache holds.
            segments: int[B, S]; a token sees its own segment only, 0 is padding; None is one segment.
            embeddings: dtype[B, S, E] in the place of embedded tokens: this is how media enter.
            deepstack: dtype[B, S, E] each, added to what leaves the first layers, one a layer.
            cache: KVCache to read from and add to.
            logits_at: int[B, M], the places whose logits are wanted; None is all.
            project: False stops before the head and gives HeadInputs in the place of logits.

        Returns:
            float32[B, S or M, V], with a cache (logits, cache). A position beyond a table of learned ones, or
            beyond `longest`, makes NaN.

        Raises:
            ConfigError: more tokens than learned positions or `longest`, where `positions` does not say otherwise.
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
            # Padding may be counted on beyond the table.
            counted = positions if segments is None else jnp.where(segments > 0, positions, 0)
            x = x + self.position_embedding(counted + dialect.position_offset)
        else:
            length = _text_length(positions, segments) if dialect.rope_scaling.kind == "dynamic" else None
            parts = mrope_parts(dialect.mrope_sections, dialect.mrope_interleaved) if positions.ndim == 3 else None
            angles = rotary_angles(positions, c.rotary_dim, dialect.rope_theta, dialect.rope_scaling, length, parts)
        x = constrain(x, "batch", "seq", None)
        layer_caches, place = None, None
        if cache is not None:
            cache, index = cache.reserve(segments, positions)
            layer_caches, place = (cache.keys, cache.values), (cache.segments, index)
        windows = None
        if len(set(c.windows)) > 1:
            windows = jnp.array([jnp.iinfo(jnp.int32).max if w is None else w for w in c.windows], jnp.int32)
        stacked, numbers = (jnp.stack(deepstack), jnp.arange(c.num_layers)) if deepstack else (None, None)
        x, written = self.layers(x, (layer_caches, windows, numbers), segments, angles, place, stacked)
        if logits_at is not None:
            x = jnp.take_along_axis(x, logits_at[..., None], axis=1)
        if dialect.final_norm:
            x = self.final_norm(x)
        if dialect.embedding_size is not None:
            x = self.embedding_out(x)
        if not project:
            return head_inputs(x, self.token_embedding, None if c.tie_word_embeddings else self.lm_head)
        logits = self.token_embedding.attend(x) if c.tie_word_embeddings else self.lm_head(x)
        logits = constrain(logits.astype(jnp.float32), "batch", "seq", "vocab")
        if cache is None:
            return logits
        return logits, cache.replace(keys=written[0], values=written[1])


def _text_length(positions: jax.Array, segments: jax.Array | None) -> jax.Array:
    """int[B, S]: one more than the largest position in each token's own text, whatever shares its row or batch."""
    if segments is None:
        return jnp.broadcast_to(positions.max(axis=1, keepdims=True) + 1, positions.shape)
    same = segments[:, :, None] == segments[:, None, :]
    return jnp.where(same, positions[:, None, :], 0).max(axis=2) + 1
