"""CLAP's text encoder (arXiv 2211.06687): a RoBERTa (arXiv 1907.11692), whose first token represents the text."""

from __future__ import annotations

from dataclasses import dataclass

import jax.numpy as jnp
from flax import linen as nn

from mllm_jax.checkpoints.architectures import architecture, kind_of
from mllm_jax.checkpoints.config_json import LAYERS, Fields, check_written, read_fields, write_fields
from mllm_jax.checkpoints.config_options import ENCODER_ACTIVATIONS, ConfigOptions
from mllm_jax.checkpoints.table import OUT_OF_HEADS, Table, Weight, families, into_heads, linear, norm, token_sample
from mllm_jax.encoders.text_encoder import TextOutput
from mllm_jax.errors import ConfigError
from mllm_jax.layers.attention import Attention
from mllm_jax.layers.compute import WithCompute
from mllm_jax.layers.linear import Embedding, Linear
from mllm_jax.layers.mlp import ACTIVATIONS, MLP
from mllm_jax.layers.norms import LayerNorm
from mllm_jax.layers.requirements import Requirements
from mllm_jax.layers.stack import layers_of
from mllm_jax.sharding.logical import constrain

MODEL, WHOLE = "ClapTextModelWithProjection", "ClapModel"


@dataclass(frozen=True)
class ClapTextConfig(WithCompute):
    """Sizes of CLAP's text encoder; the defaults are those of its published model.

    Attributes:
        max_position_embeddings: rows of the position table. Its first tokens' row is `pad_token_id` + 1; row
            `pad_token_id` is that of padding, which is recognised by its id, with a mask or without.
        num_types: rows of the table of token types, of which the first is added to every token.
        projection_size: width of the projected vector.
        projection_activation: between the two linear maps of the projection.
    """

    vocab_size: int = 50265
    hidden_size: int = 768
    num_layers: int = 12
    num_heads: int = 12
    mlp_size: int = 3072
    activation: str = "gelu"
    norm_eps: float = 1e-12
    max_position_embeddings: int = 514
    num_types: int = 1
    projection_size: int = 512
    projection_activation: str = "relu"
    bos_token_id: int | None = 0
    eos_token_id: tuple[int, ...] = (2,)
    pad_token_id: int = 1

    family = MODEL  # the Hugging Face architecture of the saved folder

    def __post_init__(self):
        require = Requirements("CLAP's text encoder", self)
        require.heads()
        require.one_of("activation", ACTIVATIONS)
        require.one_of("projection_activation", ACTIVATIONS)
        require(
            self.max_length > 0,
            f"max_position_embeddings {self.max_position_embeddings} with pad_token_id {self.pad_token_id}",
            "a position for each token: the table's rows up to pad_token_id are not those of tokens",
            "change max_position_embeddings or pad_token_id",
        )
        require(
            self.pad_token_id < self.vocab_size,
            f"pad_token_id {self.pad_token_id} of {self.vocab_size} tokens",
            "an id in the vocabulary",
            "change pad_token_id",
        )

    @property
    def max_length(self) -> int:
        """The largest number of tokens of a text."""
        return self.max_position_embeddings - self.pad_token_id - 1

    @property
    def output_size(self) -> int:
        """The width of a text's vector."""
        return self.projection_size

    def make(self) -> ClapText:
        return ClapText(self)


class ClapTextBlock(nn.Module):
    """Transformer layer with a norm after each sum; a token sees those that the mask allows."""

    config: ClapTextConfig
    keep: bool = False

    @nn.compact
    def __call__(self, x, _, segments, keys):
        c = self.config
        dtype = jnp.dtype(c.dtype)
        attended, _ = Attention(c.num_heads, dtype=dtype, name="attention")(x, segments=segments, k_segments=keys)
        x = LayerNorm(c.norm_eps, dtype, name="attention_norm")(x + attended)
        h = MLP(c.mlp_size, c.activation, dtype=dtype, name="mlp")(x)
        x = constrain(LayerNorm(c.norm_eps, dtype, name="mlp_norm")(x + h), "batch", "seq", None)
        return x, x if self.keep else None


class ClapText(nn.Module):
    """A text encoder with a projected vector (reference: `ClapTextModelWithProjection`)."""

    config: ClapTextConfig

    @nn.compact
    def __call__(self, tokens, mask=None, *, output_hidden_states: bool = False) -> TextOutput:
        """Encodes one text a row.

        Args:
            tokens: int[B, L], padded with `pad_token_id`.
            mask: int[B, L], 0 at positions that no token may see; None: all are seen, padding too.

        Returns:
            `last_hidden_state` [B, L, E], `pooler_output` [B, E] and `text_embeds` [B, projection_size], which is not
            scaled to length 1.

        Raises:
            ConfigError: more tokens than positions.
        """
        c = self.config
        dtype = jnp.dtype(c.dtype)
        if tokens.shape[1] > c.max_length:
            raise ConfigError(f"a text of {tokens.shape[1]} tokens", f"at most {c.max_length}", "shorten the text")
        real = jnp.asarray(tokens != c.pad_token_id, jnp.int32)
        positions = c.pad_token_id + real * jnp.cumsum(real, axis=1)
        rows = (None, "embed")
        x = Embedding(c.vocab_size, c.hidden_size, dtype=dtype, name="token_embedding")(tokens)
        x += Embedding(c.num_types, c.hidden_size, rows, dtype=dtype, name="type_embedding")(jnp.zeros_like(positions))
        x += Embedding(c.max_position_embeddings, c.hidden_size, rows, dtype=dtype, name="position_embedding")(
            positions
        )
        embedded = x = LayerNorm(c.norm_eps, dtype, name="embedding_norm")(x)
        segments = None if mask is None else jnp.ones_like(positions)
        keys = None if mask is None else jnp.asarray(mask != 0, jnp.int32)
        x, states = layers_of(c, ClapTextBlock, 2)(c, output_hidden_states, name="layers")(x, None, segments, keys)
        pooled = jnp.tanh(Linear((c.hidden_size,), ("embed", None), use_bias=True, dtype=dtype, name="pooler")(x[:, 0]))
        wide = dict(features=(c.projection_size,), use_bias=True, dtype=dtype)
        h = Linear(names=("embed", None), **wide, name="projection_in")(pooled)
        projected = Linear(names=(None, "embed"), **wide, name="projection_out")(
            ACTIVATIONS[c.projection_activation](h)
        )
        return TextOutput(x, pooled, projected, (embedded, *states) if output_hidden_states else None)


# ---- Hugging Face folders

_DEFAULTS = ClapTextConfig()
_FIELDS: Fields = {
    field: (name, kind, getattr(_DEFAULTS, field)) for field, (name, kind, *_) in LAYERS.items()
} | {
    "vocab_size": ("vocab_size", "size", _DEFAULTS.vocab_size),
    "mlp_size": ("intermediate_size", "size", _DEFAULTS.mlp_size),
    "norm_eps": ("layer_norm_eps", "number", _DEFAULTS.norm_eps, 0.0),
    "max_position_embeddings": ("max_position_embeddings", "size", _DEFAULTS.max_position_embeddings),
    "num_types": ("type_vocab_size", "size", _DEFAULTS.num_types),
    "projection_size": ("projection_dim", "size", _DEFAULTS.projection_size),
    "bos_token_id": ("bos_token_id", "id", _DEFAULTS.bos_token_id),
    "eos_token_id": ("eos_token_id", "ids", _DEFAULTS.eos_token_id),
    "pad_token_id": ("pad_token_id", "count", _DEFAULTS.pad_token_id),
}  # fmt: skip
_ACTIVATIONS = dict(activation="hidden_act", projection_activation="projection_hidden_act")


def from_hf_config(values: dict) -> ClapTextConfig:
    """Reads config.json of `ClapTextModelWithProjection`; every option is honoured or refused by name."""
    what = f"config.json of {architecture(values, MODEL)}"
    options = ConfigOptions(values, what)
    read = read_fields(options, _FIELDS)
    for field, name in _ACTIVATIONS.items():
        read[field] = options.activation(name, ENCODER_ACTIVATIONS, getattr(_DEFAULTS, field))
    options.only("position_embedding_type", "absolute")
    # Of the whole CLAP, which older versions wrote here.
    options.skip("fusion_hidden_size", "fusion_num_hidden_layers", "tie_word_embeddings")
    options.done()
    return ClapTextConfig(**read)


def from_whole(values: dict) -> ClapTextConfig:
    """Reads the text encoder of config.json of `ClapModel`; the audio encoder is not read."""
    options = ConfigOptions(values, f"config.json of {architecture(values, WHOLE)}")
    text = options.part("text_config")
    shared = dict(projection_dim=_DEFAULTS.projection_size, projection_hidden_act=_DEFAULTS.projection_activation)
    shared = {name: options.only(name, values.get(name, default)) for name, default in shared.items()}
    options.skip("audio_config", "logit_scale_init_value", "hidden_size", "num_hidden_layers", "tie_word_embeddings")
    options.done()
    return from_hf_config(text | shared | dict(architectures=[MODEL]))


def to_hf_config(config: ClapTextConfig) -> dict:
    """Returns config.json, the inverse of `from_hf_config`."""
    fields = _FIELDS | {field: (name, "activation") for field, name in _ACTIVATIONS.items()}
    return check_written(config, kind_of(MODEL) | write_fields(config, fields), from_hf_config, "a text encoder")


def table(config: ClapTextConfig) -> Table:
    """Returns the table of the weights."""
    c, embeddings, layer = config, "text_model.embeddings", "text_model.encoder.layer.{layer}"
    head = c.hidden_size // c.num_heads
    weights = [
        Weight(f"{embeddings}.word_embeddings.weight", "token_embedding/embedding"),
        Weight(f"{embeddings}.token_type_embeddings.weight", "type_embedding/embedding"),
        Weight(f"{embeddings}.position_embeddings.weight", "position_embedding/embedding"),
        *norm(f"{embeddings}.LayerNorm", "embedding_norm"),
        *into_heads(
            [f"{layer}.attention.self.{part}" for part in ("query", "key", "value")],
            "layers/attention",
            head,
            (c.hidden_size,) * 3,
        ),
        *linear(f"{layer}.attention.output.dense", "layers/attention/out", OUT_OF_HEADS, {"h": head}),
        *norm(f"{layer}.attention.output.LayerNorm", "layers/attention_norm"),
        *linear(f"{layer}.intermediate.dense", "layers/mlp/up"),
        *linear(f"{layer}.output.dense", "layers/mlp/down"),
        *norm(f"{layer}.output.LayerNorm", "layers/mlp_norm"),
        *linear("text_model.pooler.dense", "pooler"),
        *linear("text_projection.linear1", "projection_in"),
        *linear("text_projection.linear2", "projection_out"),
    ]
    ignored = f"{embeddings}.position_ids", f"{embeddings}.token_type_ids", _REST
    return Table(tuple(weights), ((r"^(audio_model|audio_projection|logit_scale_[at])\b.*", _REST),), ignored)


_REST = "audio"  # the other parameters of a whole CLAP
_WAYS = dict(to_hf=to_hf_config, table=table, sample=token_sample)
FAMILIES = (
    *families({MODEL: "CLAP text with projection"}, from_hf=from_hf_config, **_WAYS),
    *families({WHOLE: "CLAP, of which the text encoder is read"}, from_hf=from_whole, **_WAYS),
)
