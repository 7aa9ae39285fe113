"""The common parts of the decoders' Hugging Face folders: their options, read and written, and their weights' names."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from mllm_jax.checkpoints.architectures import kind_of
from mllm_jax.checkpoints.config_json import LAYERS, Fields, check_written, read_fields, stored_fields, write_fields
from mllm_jax.checkpoints.config_options import ConfigOptions
from mllm_jax.checkpoints.fields import make_config
from mllm_jax.checkpoints.table import LINEAR, OUT_OF_HEADS, Table, Weight, beside, into_heads, linear, norm
from mllm_jax.errors import ConfigError
from mllm_jax.layers.rotary import RopeScaling
from mllm_jax.llms.decoder import DecoderConfig

IDS: Fields = {
    "bos_token_id": ("bos_token_id", "id"),
    "eos_token_id": ("eos_token_id", "ids"),
    "pad_token_id": ("pad_token_id", "id"),
}
_FIELDS: Fields = (
    IDS
    | LAYERS
    | {
        "vocab_size": ("vocab_size", "size"),
        "mlp_size": ("intermediate_size", "size"),
        "activation": ("hidden_act", "activation"),
        "norm_eps": ("rms_norm_eps", "number", ..., 0.0),
        "tie_word_embeddings": ("tie_word_embeddings", "flag"),
        "max_position_embeddings": ("max_position_embeddings", "size"),
    }
)
# The range of the options of rotary scaling; beyond it, angles or scores are infinite or NaN.
_STRETCH = (1.0, 1e6)
_ROPE_RANGES = dict(factor=_STRETCH) | dict.fromkeys(
    ("low_freq_factor", "high_freq_factor", "beta_fast", "beta_slow", "attention_factor", "mscale", "mscale_all_dim"),
    (1e-3, 1e3),
)
# The options of each kind of rotary scaling, and the optional ones among them.
_ROPE_OPTIONAL = ("beta_fast", "beta_slow", "truncate", "attention_factor", "mscale", "mscale_all_dim")
_ROPE_OPTIONS = {
    "default": (),
    "linear": ("factor",),
    "dynamic": ("factor",),
    "llama3": ("factor", "original_max_position_embeddings", "low_freq_factor", "high_freq_factor"),
    "yarn": ("factor", "original_max_position_embeddings", *_ROPE_OPTIONAL),
}


def read_rope(options: ConfigOptions, what: str, partial: bool = False) -> dict:
    """Reads the rotary options in either spelling: rope_parameters, or rope_theta and rope_scaling.

    Args:
        what: name of the file in messages.
        partial: whether the family may rotate only a part of each head's dimensions.

    Raises:
        ConfigError: a kind that is not implemented, an option that the kind does not have, or a refused part.
    """
    longest = options.size("max_position_embeddings")
    stored = options.part("rope_scaling", {}) or options.part("rope_parameters", {})
    options.skip("rope_parameters")
    # Options inside have precedence over those outside.
    beside = dict(
        rope_type=stored.get("type", "default"),
        rope_theta=options.number("rope_theta", 10_000.0, least=1.0),
        partial_rotary_factor=options.number("partial_rotary_factor", 1.0, least=0.0, most=1.0),
    )
    inside = {name: value for name, value in stored.items() if value is not None and name != "type"}
    rope = ConfigOptions(beside | inside, f"rope options in {what}")
    kind = rope.only("rope_type", *_ROPE_OPTIONS)
    scaling = {}
    if kind == "dynamic":
        scaling["original_max_position_embeddings"] = longest
    if kind in ("llama3", "yarn"):
        scaling["original_max_position_embeddings"] = rope.size("original_max_position_embeddings", longest)
    if kind == "yarn":
        scaling["factor"] = rope.number("factor", longest / scaling["original_max_position_embeddings"], *_STRETCH)
    for name in _ROPE_OPTIONS[kind]:
        if name not in scaling and (name in rope or name not in _ROPE_OPTIONAL):
            scaling[name] = rope.flag(name) if name == "truncate" else rope.number(name, ..., *_ROPE_RANGES[name])
    if kind == "llama3" and scaling["low_freq_factor"] >= scaling["high_freq_factor"]:
        raise ConfigError(
            f"rope options in {what}: low_freq_factor={scaling['low_freq_factor']!r}",
            f"less than high_freq_factor={scaling['high_freq_factor']!r}",
            "restore it from its origin",
        )
    read = dict(
        rope_theta=rope.number("rope_theta", least=1.0),
        rope_scaling=RopeScaling(kind, **scaling),
        partial_rotary_factor=rope.number("partial_rotary_factor", least=0.0, most=1.0)
        if partial
        else rope.only("partial_rotary_factor", 1.0),
    )
    rope.done()
    return read


def write_rope(c: DecoderConfig) -> dict:
    """Writes the older spelling, which every version of transformers reads."""
    s = c.dialect.rope_scaling
    values = {name: getattr(s, name) for name in _ROPE_OPTIONS[s.kind]}
    scaling = {"rope_type": s.kind} | {name: value for name, value in values.items() if value is not None}
    return dict(rope_theta=c.dialect.rope_theta, rope_scaling=None if s.kind == "default" else scaling)


def read_decoder(options: ConfigOptions, what: str, *, partial_rotary: bool = False, **switches) -> DecoderConfig:
    """Reads the options that LLaMA and its descendants have in common; refuses those that nothing has read.

    Args:
        what: name of the file in messages.
        switches: fields of the config or of its dialect that the family determines.
    """
    width, heads = options.size("hidden_size"), options.size("num_attention_heads")
    head_dim = options.size("head_dim", None)
    if head_dim is None:
        options.divided("hidden_size", "num_attention_heads")
    kv_heads = options.size("num_key_value_heads", heads)
    if "num_key_value_heads" in options:
        options.divided("num_attention_heads", "num_key_value_heads")
    read = read_fields(options, _FIELDS) | read_rope(options, what, partial_rotary)
    read |= dict(num_kv_heads=kv_heads, head_dim=None if head_dim == width // heads else head_dim)
    options.done()
    return make_config(DecoderConfig, **read | switches)


def write_decoder(c: DecoderConfig) -> dict:
    """Writes the options of a decoder, the inverse of `read_decoder`."""
    heads = dict(num_key_value_heads=c.num_kv_heads, head_dim=c.size_per_head)
    return kind_of(c.family) | heads | write_fields(c, _FIELDS) | write_rope(c)


def faithful(c: DecoderConfig, written: dict, read: Callable[[dict], DecoderConfig]) -> dict:
    """Returns `written`, if reading it gives the same decoder.

    Raises:
        ConfigError: some fields cannot be expressed in the family's options; names them.
    """
    return check_written(c, written, read, "a decoder", _facts)


def _facts(c: DecoderConfig) -> dict:
    """Returns the stored fields, with one value for the equivalent ways to write a decoder."""
    return stored_fields(c) | dict(
        head_dim=c.size_per_head,
        layer_types=c.windows,
        sliding_window=max((w for w in c.windows if w is not None), default=None),
        embedding_size=c.dialect.embedding_size or c.hidden_size,
    )


@dataclass(frozen=True)
class DecoderNames:
    """The hub's names of a decoder's tensors; q, k and v, or gate and up, have one name if one tensor fuses them."""

    embedding: str = "model.embed_tokens"
    head: str = "lm_head"
    final_norm: str = "model.norm"
    layers: str = "model.layers"
    attention_norm: str = "input_layernorm"
    q: str = "self_attn.q_proj"
    k: str = "self_attn.k_proj"
    v: str = "self_attn.v_proj"
    out: str = "self_attn.o_proj"
    q_norm: str = "self_attn.q_norm"
    k_norm: str = "self_attn.k_norm"
    mlp_norm: str = "post_attention_layernorm"
    gate: str = "mlp.gate_proj"
    up: str = "mlp.up_proj"
    down: str = "mlp.down_proj"
    positions: str = ""
    embedding_in: str = ""
    embedding_out: str = ""
    spellings: tuple[tuple[str, str], ...] = ((r"^(embed_tokens|layers|norm)\.", r"model.\1."),)
    ignored: tuple[str, ...] = ("model.rotary_emb.inv_freq", "model.layers.{layer}.self_attn.rotary_emb.inv_freq")


def decoder_table(c: DecoderConfig, names: DecoderNames = DecoderNames()) -> Table:
    """Returns the table of a decoder's weights under a family's names."""
    dialect = c.dialect
    layer, head = f"{names.layers}.{{layer}}", {"h": c.size_per_head}

    def own_norm(name: str, path: str) -> list[Weight]:
        return norm(name, path, bias=dialect.norm == "layer") if dialect.norm_affine else []

    weights = [Weight(f"{names.embedding}.weight", "token_embedding/embedding")]
    if dialect.positions == "learned":
        weights.append(Weight(f"{names.positions}.weight", "position_embedding/embedding"))
    if dialect.embedding_size is not None:
        weights += linear(names.embedding_in, "embedding_in", bias=False)
        weights += linear(names.embedding_out, "embedding_out", bias=False)
    weights += own_norm(f"{layer}.{names.attention_norm}", "layers/attention_norm")
    stored = [f"{layer}.{name}" for name in (names.q, names.k, names.v)]
    rows = [heads * c.size_per_head for heads in (c.num_heads, c.num_kv_heads, c.num_kv_heads)]
    weights += into_heads(stored, "layers/attention", c.size_per_head, rows, "qkv" if dialect.qkv_bias else "")
    weights += linear(f"{layer}.{names.out}", "layers/attention/out", OUT_OF_HEADS, head, bias=dialect.out_bias)
    if c.qk_norm:
        weights += norm(f"{layer}.{names.q_norm}", "layers/attention/q_norm", bias=False)
        weights += norm(f"{layer}.{names.k_norm}", "layers/attention/k_norm", bias=False)
    weights += own_norm(f"{layer}.{names.mlp_norm}", "layers/mlp_norm")
    wide = [("gate", names.gate)] * dialect.gated + [("up", names.up)]
    parts = [(f"{layer}.{name}", f"layers/mlp/{part}") for part, name in wide]
    weights += beside([(f"{name}.weight", f"{path}/kernel", c.mlp_size) for name, path in parts], LINEAR)
    if dialect.mlp_bias:
        weights += beside([(f"{name}.bias", f"{path}/bias", c.mlp_size) for name, path in parts])
    weights += linear(f"{layer}.{names.down}", "layers/mlp/down", bias=dialect.mlp_bias)
    if dialect.final_norm:
        weights += own_norm(names.final_norm, "final_norm")
    if not c.tie_word_embeddings:
        weights += linear(names.head, "lm_head", bias=False)
    ignored = names.ignored + ((f"{names.head}.weight",) if c.tie_word_embeddings else ())
    return Table(tuple(weights), names.spellings, ignored)
