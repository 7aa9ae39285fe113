"""OPT (arXiv 2205.01068): LayerNorm, learned positions, a plain MLP with ReLU, and biases.

OPT-350m differs from its siblings: norms behind each sum, and an embedding narrower than the stream.
"""

from __future__ import annotations

from mllm_jax.checkpoints.architectures import architecture, model_type
from mllm_jax.checkpoints.config_json import read_activation, write_activation
from mllm_jax.checkpoints.options import Options
from mllm_jax.checkpoints.sample import token_sample
from mllm_jax.checkpoints.table import Family, Table
from mllm_jax.llms.decoder import DecoderConfig
from mllm_jax.llms.hub import (
    Names,
    decoder_table,
    faithful,
    read_ids,
    write_ids,
)

# What an option is where config.json does not say.
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
_NAMES = Names(
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
    """config.json of OPTForCausalLM, every option honoured or refused by name."""
    family = architecture(values, "OPTForCausalLM")
    options = Options(_DEFAULTS | values, f"config.json of {family}")
    width, heads = options.size("hidden_size"), options.size("num_attention_heads")
    options.divided("hidden_size", "num_attention_heads")
    embedding_size, bias = options.size("word_embed_proj_dim", width), options.flag("enable_bias", True)
    norm_first = options.flag("do_layer_norm_before", True)
    # Early fine-tuned checkpoints lack the last norm.
    removed = options.flag("_remove_final_layer_norm", False)
    config = DecoderConfig(
        vocab_size=options.size("vocab_size"),
        hidden_size=width,
        num_layers=options.size("num_hidden_layers"),
        num_heads=heads,
        num_kv_heads=heads,
        mlp_size=options.size("ffn_dim"),
        activation=read_activation(options, "activation_function"),
        gated=False,
        norm="layer",
        norm_affine=options.flag("layer_norm_elementwise_affine", True),
        norm_eps=1e-5,
        norm_first=norm_first,
        final_norm=norm_first and not removed,
        positions="learned",
        position_offset=2,
        tie_word_embeddings=options.flag("tie_word_embeddings", True),
        embedding_size=None if embedding_size == width else embedding_size,
        qkv_bias=bias,
        out_bias=bias,
        mlp_bias=bias,
        max_position_embeddings=options.size("max_position_embeddings"),
        family=family,
        **read_ids(options),
    )
    options.done()
    return config


def to_hf_config(config: DecoderConfig) -> dict:
    """The reverse; refuses switches that the family does not have."""
    c = config
    written = dict(
        architectures=[c.family],
        model_type=model_type(c.family),
        vocab_size=c.vocab_size,
        hidden_size=c.hidden_size,
        num_hidden_layers=c.num_layers,
        num_attention_heads=c.num_heads,
        ffn_dim=c.mlp_size,
        activation_function=write_activation(c.activation),
        layer_norm_elementwise_affine=c.norm_affine,
        do_layer_norm_before=c.norm_first,
        _remove_final_layer_norm=c.norm_first and not c.final_norm,
        tie_word_embeddings=c.tie_word_embeddings,
        word_embed_proj_dim=c.embedding_size or c.hidden_size,
        enable_bias=c.qkv_bias,
        max_position_embeddings=c.max_position_embeddings,
        **write_ids(c),
    )
    return faithful(c, written, from_hf_config)


def table(config: DecoderConfig) -> Table:
    return decoder_table(config, _NAMES)


FAMILIES = (
    Family(
        name="OPT",
        architectures=("OPTForCausalLM",),
        from_hf=from_hf_config,
        to_hf=to_hf_config,
        table=table,
        sample=token_sample,
        oracle="OPTForCausalLM",
    ),
)
