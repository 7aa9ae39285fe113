"""OPT (arXiv 2205.01068): LayerNorm, learned positions, a plain MLP with ReLU, and biases.

OPT-350m differs from the other sizes: a norm follows each sum, and the embedding is narrower than the stream.
"""

from __future__ import annotations

from functools import partial

from mllm_jax.checkpoints.architectures import architecture, kind_of
from mllm_jax.checkpoints.config_json import LAYERS, Fields, read_fields, write_fields
from mllm_jax.checkpoints.config_options import ConfigOptions
from mllm_jax.checkpoints.fields import make_config
from mllm_jax.checkpoints.table import families, token_sample
from mllm_jax.llms.decoder import DecoderConfig
from mllm_jax.llms.decoder_hub import IDS, DecoderNames, decoder_table, faithful

# Defaults of the options that config.json leaves out.
_DEFAULTS = dict(
    vocab_size=50272,
    hidden_size=768,
    num_hidden_layers=12,
    ffn_dim=3072,
    num_attention_heads=12,
    max_position_embeddings=2048,
    activation_function="relu",
    pad_token_id=1,
    bos_token_id=2,
    eos_token_id=2,
)
_FIELDS: Fields = (
    IDS
    | LAYERS
    | {
        "vocab_size": ("vocab_size", "size"),
        "mlp_size": ("ffn_dim", "size"),
        "activation": ("activation_function", "activation"),
        "norm_affine": ("layer_norm_elementwise_affine", "flag", True),
        "norm_first": ("do_layer_norm_before", "flag", True),
        "tie_word_embeddings": ("tie_word_embeddings", "flag", True),
        "qkv_bias": ("enable_bias", "flag", True),
        "max_position_embeddings": ("max_position_embeddings", "size"),
    }
)
_NAMES = DecoderNames(
    embedding="model.decoder.embed_tokens",
    positions="model.decoder.embed_positions",
    embedding_in="model.decoder.project_in",
    embedding_out="model.decoder.project_out",
    final_norm="model.decoder.final_layer_norm",
    layers="model.decoder.layers",
    attention_norm="self_attn_layer_norm",
    out="self_attn.out_proj",
    mlp_norm="final_layer_norm",
    up="fc1",
    down="fc2",
    spellings=((r"^decoder\.", "model.decoder."),),
    ignored=(),
)


def from_hf_config(values: dict) -> DecoderConfig:
    """Reads config.json of OPTForCausalLM; every option is honoured or refused by name."""
    family = architecture(values, "OPTForCausalLM")
    options = ConfigOptions(_DEFAULTS | values, f"config.json of {family}")
    read = read_fields(options, _FIELDS)
    options.divided("hidden_size", "num_attention_heads")
    embedding_size = options.size("word_embed_proj_dim", read["hidden_size"])
    # Early fine-tuned checkpoints lack the last norm.
    removed = options.flag("_remove_final_layer_norm", False)
    config = make_config(
        DecoderConfig,
        **read,
        num_kv_heads=read["num_heads"],
        gated=False,
        norm="layer",
        norm_eps=1e-5,
        final_norm=read["norm_first"] and not removed,
        positions="learned",
        position_offset=2,
        embedding_size=None if embedding_size == read["hidden_size"] else embedding_size,
        out_bias=read["qkv_bias"],
        mlp_bias=read["qkv_bias"],
        family=family,
    )
    options.done()
    return config


def to_hf_config(config: DecoderConfig) -> dict:
    """Returns config.json, the inverse of `from_hf_config`; refuses switches that the family does not have."""
    c = config
    written = dict(
        **kind_of(c.family),
        _remove_final_layer_norm=c.dialect.norm_first and not c.dialect.final_norm,
        word_embed_proj_dim=c.dialect.embedding_size or c.hidden_size,
        **write_fields(c, _FIELDS),
    )
    return faithful(c, written, from_hf_config)


table = partial(decoder_table, names=_NAMES)


FAMILIES = families(
    {"OPTForCausalLM": "OPT"}, from_hf=from_hf_config, to_hf=to_hf_config, table=table, sample=token_sample
)
