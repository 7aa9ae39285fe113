"""LLaMA 1, 2 and 3 (arXiv 2302.13971, 2307.09288, 2407.21783), Vicuna and Mistral (arXiv 2310.06825).

Mistral is LLaMA with a sliding window and without biases.
"""

from __future__ import annotations

from mllm_jax.checkpoints.architectures import architecture
from mllm_jax.checkpoints.config_options import ConfigOptions
from mllm_jax.checkpoints.table import families, token_sample
from mllm_jax.errors import ConfigError
from mllm_jax.llms.decoder import DecoderConfig
from mllm_jax.llms.decoder_hub import decoder_table, faithful, read_decoder, write_decoder

# Defaults of the options that config.json leaves out.
_BOTH = dict(
    vocab_size=32000,
    hidden_size=4096,
    num_hidden_layers=32,
    num_attention_heads=32,
    hidden_act="silu",
    rms_norm_eps=1e-6,
    bos_token_id=1,
    eos_token_id=2,
    tie_word_embeddings=False,
)
_WIDER = dict(intermediate_size=14336, max_position_embeddings=131072)
_DEFAULTS = {
    "LlamaForCausalLM": _BOTH | dict(intermediate_size=11008, max_position_embeddings=2048),
    "MistralForCausalLM": _BOTH | _WIDER | dict(num_key_value_heads=8, sliding_window=4096),
}


def from_hf_config(values: dict) -> DecoderConfig:
    """Reads config.json of LlamaForCausalLM or MistralForCausalLM; every option is honoured or refused by name."""
    family = architecture(values, *_DEFAULTS)
    what = f"config.json of {family}"
    options = ConfigOptions(_DEFAULTS[family] | values, what)
    if family == "MistralForCausalLM":
        return read_decoder(options, what, family=family, sliding_window=options.size("sliding_window", None))
    bias = options.flag("attention_bias", False)
    options.only("rope_interleaved", False)
    switches = dict(qkv_bias=bias, out_bias=bias, mlp_bias=options.flag("mlp_bias", False))
    return read_decoder(options, what, family=family, **switches)


def to_hf_config(config: DecoderConfig) -> dict:
    """Returns config.json, the inverse of `from_hf_config`; refuses switches that the family does not have."""
    written = write_decoder(config)
    if config.family == "MistralForCausalLM":
        written |= dict(sliding_window=config.dialect.sliding_window)
    else:
        if config.hidden_size % config.num_heads:
            raise ConfigError(
                f"LlamaForCausalLM with hidden_size {config.hidden_size} and {config.num_heads} heads",
                "heads that divide the hidden size: transformers refuses others",
                "change num_heads, or choose another family",
            )
        written |= dict(attention_bias=config.dialect.qkv_bias, mlp_bias=config.dialect.mlp_bias)
    return faithful(config, written, from_hf_config)


table = decoder_table

FAMILIES = families(
    {"LlamaForCausalLM": "LLaMA, Vicuna", "MistralForCausalLM": "Mistral"},
    from_hf=from_hf_config,
    to_hf=to_hf_config,
    table=table,
    sample=token_sample,
)
