"""T5 1.0, T5 1.1 and Flan-T5: an encoder-decoder with relative positions (arXiv 1910.10683, 2210.11416)."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, fields
from typing import ClassVar

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax import struct

from mllm_jax.checkpoints.architectures import kind_of
from mllm_jax.checkpoints.config_json import Fields, read_fields, write_activation, write_fields
from mllm_jax.checkpoints.config_options import ACTIVATIONS, ConfigOptions
from mllm_jax.checkpoints.fields import change_fields, make_config
from mllm_jax.checkpoints.table import OUT_OF_HEADS, Family, Table, Weight, into_heads, linear, norm
from mllm_jax.errors import DataError
from mllm_jax.layers.attention import write_at
from mllm_jax.layers.compute import WithCompute
from mllm_jax.layers.head import head_inputs
from mllm_jax.layers.linear import Embedding, Linear
from mllm_jax.layers.norms import RMSNorm
from mllm_jax.layers.relative_bias import RelativeBias, bucket_of_distance
from mllm_jax.layers.requirements import Requirements
from mllm_jax.layers.stack import scan_layers
from mllm_jax.llms.cache import KVCache
from mllm_jax.llms.t5_blocks import EncoderBlock, T5DecoderBlock
from mllm_jax.sharding.logical import constrain


@dataclass(frozen=True)
class T5Dialect:
    """Differences between the versions of T5; the defaults are T5 1.0's.

    Attributes:
        gated: False with activation "relu" is T5 1.0; True with "gelu_tanh" is T5 1.1 and Flan-T5. BLIP-2 uses Flan-T5
            with the exact "gelu".
        num_buckets, max_distance: of the relative position bias.
        scale_outputs: whether a tied head reads outputs scaled by hidden_size**-0.5 (T5 1.0). transformers 5 saves
            False for a new model with an untied head. An untied head never reads scaled outputs.
        family: the Hugging Face architecture of the saved folder.
    """

    gated: bool = False
    num_buckets: int = 32
    max_distance: int = 128
    norm_eps: float = 1e-6
    scale_outputs: bool = True
    family: str = "T5ForConditionalGeneration"


@dataclass(frozen=True)
class T5Config(WithCompute):
    """Sizes of an encoder-decoder; details that only reproduce a version of T5 are in its dialect.

    Attributes:
        head_dim: may differ from hidden_size / num_heads.
        num_layers, num_decoder_layers: of the encoder and of the decoder.
        tie_word_embeddings: whether the head is the transposed embedding; otherwise it has its own weights.
        decoder_start_token_id: the decoder's first token in generation.
        eos_token_id: each of them ends a text.
    """

    vocab_size: int = 32128
    hidden_size: int = 512
    head_dim: int = 64
    mlp_size: int = 2048
    num_layers: int = 6
    num_decoder_layers: int = 6
    num_heads: int = 8
    activation: str = "relu"
    tie_word_embeddings: bool = True
    bos_token_id: int | None = None
    eos_token_id: tuple[int, ...] = (1,)
    pad_token_id: int | None = 0
    decoder_start_token_id: int = 0
    dialect: T5Dialect = T5Dialect()

    def __post_init__(self):
        Requirements("T5", self).one_of("activation", sorted(set(ACTIVATIONS.values())))
        for buckets in (self.dialect.num_buckets // 2, self.dialect.num_buckets):  # of the encoder and of the decoder
            bucket_of_distance(buckets, self.dialect.max_distance)

    @property
    def family(self) -> str:
        """The Hugging Face architecture of the saved folder."""
        return self.dialect.family

    encoder_decoder = True  # see `mllm_jax.llms.protocol`

    def make(self) -> T5:
        return T5(self)

    def make_cache(self, batch: int, size: int, source: int = 1) -> T5Cache:
        """Returns an empty cache for at most `size` decoded tokens and an encoded source of `source` tokens.

        `T5.start` adds the source; before that, cross-attention sees nothing.
        """
        dtype = jnp.dtype(self.dtype)
        own = KVCache.zeros(self.num_decoder_layers, batch, size, self.num_heads, self.head_dim, dtype)
        cross = KVCache.zeros(self.num_decoder_layers, batch, source, self.num_heads, self.head_dim, dtype)
        return T5Cache(
            **{field.name: getattr(own, field.name) for field in fields(own)},
            positions=jnp.zeros((batch, size), jnp.int32),
            cross_keys=cross.keys,
            cross_values=cross.values,
            cross_segments=cross.segments,
        )


@struct.dataclass
class T5Cache(KVCache):
    """The keys and values of the decoded tokens and of the source.

    positions: int[B, T] of the decoded tokens; cross_keys, cross_values: dtype[L, B, S, N, H], computed once;
    cross_segments: int[B, S] of the source, 0 is padding.
    """

    positions: jax.Array
    cross_keys: jax.Array
    cross_values: jax.Array
    cross_segments: jax.Array

    shared: ClassVar[tuple[str, ...]] = ("cross_keys", "cross_values", "cross_segments")


class _Stack(nn.Module):
    """The common part of encoder and decoder: one relative bias for all layers, the layers, a last norm."""

    config: T5Config

    def _parts(self, block: type[nn.Module], num_layers: int, num_broadcast: int, bidirectional: bool):
        c = self.config
        # The first layer holds the bias's table and the others share it: it is computed once, outside the scan.
        bias = RelativeBias(
            c.num_heads,
            c.dialect.num_buckets,
            c.dialect.max_distance,
            bidirectional,
            c.hidden_size**-0.5,
            name="relative_bias",
        )
        stack = dict(num_layers=num_layers, remat=c.remat, unroll=c.scan_unroll, num_broadcast=num_broadcast)
        layers = scan_layers(block, **stack)(c, name="layers")
        return bias, layers, RMSNorm(c.dialect.norm_eps, jnp.dtype(c.dtype), name="final_norm")


class T5Encoder(_Stack):
    """The encoder, from the embedded source to the encoded source."""

    @nn.compact
    def __call__(self, x, positions, segments):
        """Maps [B, S, E] to [B, S, E]; positions and segments are int[B, S] or None."""
        bias, layers, norm = self._parts(EncoderBlock, self.config.num_layers, 2, bidirectional=True)
        positions = jnp.arange(x.shape[1])[None] if positions is None else positions
        x, _ = layers(constrain(x, "batch", "seq", None), None, segments, bias(positions, positions))
        return norm(x)


class T5Decoder(_Stack):
    """The decoder, from the embedded target and the encoded source to the target's last hidden states."""

    @nn.compact
    def __call__(self, x, positions, segments, source, source_segments, cache):
        """Maps [B, T, E] to ([B, T, E], cache); without x, returns the layers' cross keys and values of the source."""
        bias, layers, norm = self._parts(T5DecoderBlock, self.config.num_decoder_layers, 5, bidirectional=False)
        if x is None:
            return layers(None, None, None, None, source, None, None)[1]
        x = constrain(x, "batch", "seq", None)
        if cache is None:
            positions = jnp.arange(x.shape[1])[None] if positions is None else positions
            x, _ = layers(x, None, segments, bias(positions, positions), source, source_segments, None)
            return norm(x), None
        cache, index = cache.reserve(segments)
        positions = index if positions is None else positions
        seen = write_at(cache.positions, positions, index)
        held = (cache.keys, cache.values, cache.cross_keys, cache.cross_values)
        cache_position = (cache.segments, index)
        x, (keys, values) = layers(x, held, segments, bias(positions, seen), None, cache.cross_segments, cache_position)
        return norm(x), cache.replace(keys=keys, values=values, positions=seen)


class T5(nn.Module):
    """T5 from source and target tokens to logits (reference class: `T5ForConditionalGeneration`).

    Training calls the module with both. Generation calls `start` on the source once. It then calls the module on target
    tokens with the cache, as for a decoder-only model; the first token is `decoder_start_token_id`.
    """

    config: T5Config

    def setup(self):
        c = self.config
        dtype = jnp.dtype(c.dtype)
        self.token_embedding = Embedding(c.vocab_size, c.hidden_size, init_std=1.0, dtype=dtype)
        self.encoder = T5Encoder(c)
        self.decoder = T5Decoder(c)
        if not c.tie_word_embeddings:
            self.lm_head = Linear((c.vocab_size,), ("embed", "vocab"), dtype=dtype)

    def embed(self, tokens):
        """Maps int[B, S] to dtype[B, S, E]."""
        return self.token_embedding(tokens)

    def encode(self, tokens, positions=None, segments=None, *, embeddings=None):
        """Encodes the source.

        Args:
            tokens: int[B, S] (not read when embeddings are given).
            positions: int[B, S]; only differences inside a segment count; None is 0..S-1.
            segments: int[B, S]; a token sees only its own segment, 0 is padding; None is one segment.
            embeddings: dtype[B, S, E], used instead of the embedded tokens; media enter this way.

        Returns:
            dtype[B, S, E].
        """
        return self.encoder(self.embed(tokens) if embeddings is None else embeddings, positions, segments)

    def start(self, tokens, positions=None, segments=None, *, embeddings=None, size: int):
        """Encodes a source and returns a cache with each layer's cross keys and values, from which to generate.

        Args:
            tokens, positions, segments, embeddings: see `encode`.
            size: the most decoded tokens, `decoder_start_token_id` included.

        Returns:
            T5Cache.
        """
        source = self.encode(tokens, positions, segments, embeddings=embeddings)
        keys, values = self.decoder(None, None, None, source, None, None)
        cache = self.config.make_cache(source.shape[0], size, source.shape[1])
        segments = jnp.ones(source.shape[:2], jnp.int32) if segments is None else segments
        return cache.replace(cross_keys=keys, cross_values=values, cross_segments=segments)

    def decode(
        self, tokens, positions=None, segments=None, *, source=None, source_segments=None, cache=None, project=True
    ):
        """Computes the logits of the token that follows each position of the target.

        Args:
            tokens: int[B, T] of the target, its start token first.
            positions: int[B, T]; None counts from 0, or from the cache's length.
            segments: int[B, T]; a token sees only its own segment, in the target and in the source; None is 1.
            source, source_segments: dtype[B, S, E] of `encode` and int[B, S], None is 1; not read with a cache.
            cache: T5Cache of `start`, to read from and add to.
            project: False stops before the head and returns HeadInputs instead of logits.

        Returns:
            float32[B, T, V], with a cache (logits, cache).

        Raises:
            DataError: neither a source nor a cache.
        """
        if cache is None and source is None:
            raise DataError("T5.decode without a source", "source=encode(...) or cache=start(...)", "pass one of them")
        if segments is None:
            segments = jnp.ones(tokens.shape, jnp.int32)
        if source_segments is None and cache is None:
            source_segments = jnp.ones(source.shape[:2], jnp.int32)
        x, cache = self.decoder(self.embed(tokens), positions, segments, source, source_segments, cache)
        tied = self.config.tie_word_embeddings
        x = x * self.config.hidden_size**-0.5 if tied and self.config.dialect.scale_outputs else x
        if not project:
            return head_inputs(x, self.token_embedding, None if tied else self.lm_head)
        logits = self.token_embedding.attend(x) if tied else self.lm_head(x)
        logits = constrain(logits.astype(jnp.float32), "batch", "seq", "vocab")
        return logits if cache is None else (logits, cache)

    def __call__(
        self,
        tokens,
        positions=None,
        segments=None,
        decoder_tokens=None,
        *,
        decoder_positions=None,
        decoder_segments=None,
        embeddings=None,
        cache=None,
        project=True,
    ):
        """Maps source and target to logits; with a cache the tokens are the target's, as for a decoder-only model.

        Args:
            tokens, positions, segments, embeddings: of the source, see `encode`; with a cache see `decode`.
            decoder_tokens, decoder_positions, decoder_segments: int[B, T] of the target, its start token first.
            project: see `decode`.
            cache: T5Cache of `start`.

        Returns:
            float32[B, T, V], with a cache (logits, cache).

        Raises:
            DataError: neither decoder_tokens nor a cache.
        """
        if cache is not None:
            return self.decode(tokens, positions, segments, cache=cache)
        if decoder_tokens is None:
            raise DataError(
                "T5 without decoder_tokens", "decoder_tokens int[B, T], or cache=start(...)", "pass the target"
            )
        source = self.encode(tokens, positions, segments, embeddings=embeddings)
        target = decoder_tokens, decoder_positions, decoder_segments
        return self.decode(*target, source=source, source_segments=segments, project=project)


MOST_DISTANCE = 1 << 20  # the bucket of each distance is computed separately
_FIELDS: Fields = {
    "vocab_size": ("vocab_size", "size", T5Config.vocab_size),
    "hidden_size": ("d_model", "size", T5Config.hidden_size),
    "head_dim": ("d_kv", "size", T5Config.head_dim),
    "mlp_size": ("d_ff", "size", T5Config.mlp_size),
    "num_layers": ("num_layers", "size", T5Config.num_layers),
    "num_heads": ("num_heads", "size", T5Config.num_heads),
    "num_buckets": ("relative_attention_num_buckets", "size", T5Dialect.num_buckets),
    "max_distance": ("relative_attention_max_distance", "size", T5Dialect.max_distance, MOST_DISTANCE),
    "norm_eps": ("layer_norm_epsilon", "number", T5Dialect.norm_eps, 0.0),
    "bos_token_id": ("bos_token_id", "id"),
    "eos_token_id": ("eos_token_id", "ids", (1,)),
    "pad_token_id": ("pad_token_id", "id", 0),
}


def from_hf_config(values: dict) -> T5Config:
    """Reads config.json of a T5 checkpoint, or the `text_config` of a model with one; the defaults are T5-small's.

    Raises:
        ConfigError: an unsupported option.
    """
    option = ConfigOptions(values, "config.json of T5ForConditionalGeneration")
    kinds = [f"{gate}{name}" for gate in ("", "gated-") for name in ACTIVATIONS]
    projection = option.only("feed_forward_proj", *kinds, default="relu")
    gate, _, name = projection.rpartition("-")
    name = option.only("dense_act_fn", *ACTIVATIONS, default="gelu_new" if projection == "gated-gelu" else name)
    for fixed, value in (("tie_encoder_decoder", False), ("is_decoder", False), ("is_encoder_decoder", True)):
        option.only(fixed, value)
    option.skip("n_positions")
    read = read_fields(option, _FIELDS)
    # transformers 5 always writes tie_word_embeddings=True; the real value is in scale_decoder_outputs.
    tied = option.flag("tie_word_embeddings", True)
    config = make_config(
        T5Config,
        **read,
        num_decoder_layers=option.size("num_decoder_layers", read["num_layers"]),
        activation=ACTIVATIONS[name],
        gated=option.flag("is_gated_act", gate == "gated"),
        tie_word_embeddings=option.flag("scale_decoder_outputs", tied),
        decoder_start_token_id=option.id("decoder_start_token_id", read["pad_token_id"]),
    )
    option.done()
    return config


def to_hf_config(config: T5Config) -> dict:
    """Returns config.json of `T5ForConditionalGeneration`."""
    c, dialect = config, config.dialect
    activation = "gelu_new" if c.activation == "gelu_tanh" else write_activation(c.activation)
    projection = "gelu" if dialect.gated and activation == "gelu_new" else activation  # "gated-gelu" means gelu_new
    return dict(
        **kind_of(c.family),
        is_encoder_decoder=True,
        num_decoder_layers=c.num_decoder_layers,
        feed_forward_proj=f"gated-{projection}" if dialect.gated else projection,
        dense_act_fn=activation,
        is_gated_act=dialect.gated,
        tie_word_embeddings=c.tie_word_embeddings,
        scale_decoder_outputs=c.tie_word_embeddings and dialect.scale_outputs,
        decoder_start_token_id=c.decoder_start_token_id,
        **write_fields(c, _FIELDS),
    )


def settle(config: T5Config, stored: Collection[str]) -> T5Config:
    """Returns the config with a tied head and unscaled outputs if no weights of an untied head are stored."""
    if config.tie_word_embeddings or any(name.endswith("lm_head.weight") for name in stored):
        return config
    return change_fields(config, tie_word_embeddings=True, scale_outputs=False)


def table(config: T5Config) -> Table:
    """Returns the table of T5ForConditionalGeneration's weights."""
    c = config
    heads, rows = {"h": c.head_dim}, (c.num_heads * c.head_dim,) * 3
    weights = [Weight("shared.weight", "token_embedding/embedding")]
    for side, sublayers in (("encoder", ("SelfAttention",)), ("decoder", ("SelfAttention", "EncDecAttention"))):
        block, path = f"{side}.block.{{layer}}.layer", f"{side}/layers"
        for i, (name, sublayer) in enumerate(zip(sublayers, ("attention", "cross_attention"), strict=False)):
            stored, ours = f"{block}.{i}.{name}", f"{path}/{sublayer}"
            weights += into_heads([f"{stored}.{part}" for part in "qkv"], ours, c.head_dim, rows, biased="")
            weights += linear(f"{stored}.o", f"{ours}/out", OUT_OF_HEADS, heads, bias=False)
            weights += norm(f"{block}.{i}.layer_norm", f"{ours}_norm", bias=False)
        mlp = f"{block}.{len(sublayers)}"
        wide = {"wi_0": "gate", "wi_1": "up", "wo": "down"} if c.dialect.gated else {"wi": "up", "wo": "down"}
        for name, part in wide.items():
            weights += linear(f"{mlp}.DenseReluDense.{name}", f"{path}/mlp/{part}", bias=False)
        weights += norm(f"{mlp}.layer_norm", f"{path}/mlp_norm", bias=False)
        weights += norm(f"{side}.final_layer_norm", f"{side}/final_norm", bias=False)
        table = f"{side}.block.0.layer.0.SelfAttention.relative_attention_bias.weight"
        weights.append(Weight(table, f"{side}/relative_bias/embedding"))
    # Copies of `shared`, and a table that is stored but never read.
    ignored = ["encoder.embed_tokens.weight", "decoder.embed_tokens.weight"]
    ignored.append("decoder.block.0.layer.1.EncDecAttention.relative_attention_bias.weight")
    if c.tie_word_embeddings:
        ignored.append("lm_head.weight")
    else:
        weights += linear("lm_head", "lm_head", bias=False)
    return Table(tuple(weights), ignored=tuple(ignored))


def sample(config: T5Config) -> tuple:
    """Returns arguments with which `init` creates every parameter."""
    tokens = jnp.zeros((1, 4), jnp.int32)
    return tokens, None, None, tokens


FAMILIES = (
    Family(
        name="T5, Flan-T5",
        architectures=("T5ForConditionalGeneration", "T5WithLMHeadModel"),
        from_hf=from_hf_config,
        to_hf=to_hf_config,
        table=table,
        sample=sample,
        settle=settle,
    ),
)
