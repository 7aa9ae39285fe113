"""GLM-4, ChatGLM2 and ChatGLM3 (arXiv 2406.12793).

They are LLaMA with biases of q, k and v. Rotary positions rotate neighbouring pairs in one half of each head's
dimensions. The checkpoints of ChatGLM2 and ChatGLM3 name and fuse their tensors differently; they are read, and saved
as GlmForCausalLM.
"""

from __future__ import annotations

from functools import partial

from mllm_jax.checkpoints.architectures import architecture
from mllm_jax.checkpoints.config_options import ConfigOptions
from mllm_jax.checkpoints.table import families, token_sample
from mllm_jax.llms.decoder import DecoderConfig
from mllm_jax.llms.decoder_hub import DecoderNames, decoder_table, faithful, read_decoder, write_decoder

# Defaults of the options that config.json leaves out.
_DEFAULTS = dict(
    vocab_size=151552,
    hidden_size=4096,
    intermediate_size=13696,
    num_hidden_layers=40,
    num_attention_heads=32,
    num_key_value_heads=2,
    head_dim=128,
    hidden_act="silu",
    max_position_embeddings=131072,
    rms_norm_eps=1.5625e-7,
    partial_rotary_factor=0.5,
    pad_token_id=151329,
    attention_bias=True,
    tie_word_embeddings=False,
)
_GLM4 = _DEFAULTS["vocab_size"]  # its vocabulary is not ChatGLM2's and 3's of 65,024
_EOS = [151329, 151336, 151338]  # also if config.json has null
_NAMES = DecoderNames(gate="mlp.gate_up_proj", up="mlp.gate_up_proj")
_CHATGLM_NAMES = DecoderNames(
    embedding="transformer.embedding.word_embeddings",
    head="transformer.output_layer",
    final_norm="transformer.encoder.final_layernorm",
    layers="transformer.encoder.layers",
    q="self_attention.query_key_value",
    k="self_attention.query_key_value",
    v="self_attention.query_key_value",
    out="self_attention.dense",
    gate="mlp.dense_h_to_4h",
    up="mlp.dense_h_to_4h",
    down="mlp.dense_4h_to_h",
    spellings=(),
    ignored=("transformer.rotary_pos_emb.inv_freq",),
)


def from_hf_config(values: dict) -> DecoderConfig:
    """Reads config.json of GlmForCausalLM; every option is honoured or refused by name."""
    family = architecture(values, "GlmForCausalLM")
    what = f"config.json of {family}"
    options = ConfigOptions(_DEFAULTS | values | {"eos_token_id": values.get("eos_token_id") or _EOS}, what)
    switches = dict(qkv_bias=options.flag("attention_bias"), rotary_interleaved=True)
    return read_decoder(options, what, partial_rotary=True, family=family, **switches)


def to_hf_config(config: DecoderConfig) -> dict:
    """Returns config.json, the inverse of `from_hf_config`; refuses switches that the family does not have."""
    own = dict(attention_bias=config.dialect.qkv_bias, partial_rotary_factor=config.dialect.partial_rotary_factor)
    return faithful(config, write_decoder(config) | own, from_hf_config)


table = partial(decoder_table, names=_NAMES)


def from_chatglm_config(values: dict) -> DecoderConfig:
    """Reads config.json of ChatGLM2 or ChatGLM3 (ChatGLMModel); every option is honoured or refused by name.

    GLM-4's first folders have this form too, and their `rope_ratio` multiplies the rotary base. For ChatGLM2 and 3
    only rope_ratio=1 is accepted: their versions for longer texts divide the positions by it or multiply the base, and
    config.json does not specify which.
    """
    options = ConfigOptions(values, "config.json of ChatGLMModel (ChatGLM2, ChatGLM3)")
    for name, needed in dict(
        original_rope=True,
        rmsnorm=True,
        post_layer_norm=True,
        apply_residual_connection_post_layernorm=False,
        add_bias_linear=False,
        prefix_projection=False,
        tie_word_embeddings=False,
        quantization_bit=0,
        pre_seq_len=0,
    ).items():
        options.only(name, needed)
    # These change the order or precision of the computation, or name code that is never executed.
    options.skip("apply_query_key_layer_scaling", "attention_softmax_in_fp32", "fp32_residual_connection")
    options.skip("bias_dropout_fusion", "vocab_size", "ffn_dropout")
    heads, layers = options.size("num_attention_heads"), options.size("num_layers")
    options.only("num_hidden_layers", layers)
    vocabulary = options.size("padded_vocab_size")
    ratio = options.number("rope_ratio", 1, 1.0, 1e6) if vocabulary == _GLM4 else options.only("rope_ratio", 1)
    translated = dict(
        architectures=["GlmForCausalLM"],
        vocab_size=vocabulary,
        hidden_size=options.size("hidden_size"),
        intermediate_size=options.size("ffn_hidden_size"),
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=options.size("multi_query_group_num")
        if options.flag("multi_query_attention", False)
        else heads,
        head_dim=options.size("kv_channels"),
        rope_theta=10_000.0 * ratio,
        rms_norm_eps=options.number("layernorm_epsilon", least=0.0),
        max_position_embeddings=options.size("seq_length"),
        attention_bias=options.flag("add_qkv_bias", False),
        bos_token_id=options.id("bos_token_id"),
        eos_token_id=options.ids("eos_token_id", (2,)),
        pad_token_id=options.id("pad_token_id", 0),
    )
    options.skip("multi_query_group_num")
    options.done()
    return from_hf_config(translated)


chatglm_table = partial(decoder_table, names=_CHATGLM_NAMES)


FAMILIES = (
    *families(
        {"GlmForCausalLM": "GLM-4"}, from_hf=from_hf_config, to_hf=to_hf_config, table=table, sample=token_sample
    ),
    *families(
        {"ChatGLMModel": "ChatGLM2, ChatGLM3"},
        from_hf=from_chatglm_config,
        to_hf=to_hf_config,
        table=chatglm_table,
        sample=token_sample,
        oracle="golden: the checkpoints' own code",
    ),
)
