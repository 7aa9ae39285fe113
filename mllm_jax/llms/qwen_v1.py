"""The first Qwen (arXiv 2309.16609): LLaMA with fused q, k and v, biases of these, and other names.

Its code changes texts longer than the trained length in two ways: `use_dynamic_ntk` raises the rotary base at each
doubling of the first chunk's length, and `use_logn_attn` scales queries by the logarithm of their position. Neither has
an effect up to `seq_length` tokens. Longer texts are refused; if only the given positions exceed it, logits are NaN.
"""

from __future__ import annotations

from functools import partial

from mllm_jax.checkpoints.architectures import architecture, kind_of
from mllm_jax.checkpoints.config_json import LAYERS, Fields, read_fields, write_fields
from mllm_jax.checkpoints.config_options import ConfigOptions
from mllm_jax.checkpoints.fields import make_config
from mllm_jax.checkpoints.table import families, token_sample
from mllm_jax.errors import ConfigError
from mllm_jax.llms.decoder import DecoderConfig
from mllm_jax.llms.decoder_hub import IDS, DecoderNames, decoder_table, faithful

ARCHITECTURE = "QWenLMHeadModel"
# The MLP is c_proj(w1(x) * silu(w2(x))).
_NAMES = DecoderNames(
    embedding="transformer.wte",
    final_norm="transformer.ln_f",
    layers="transformer.h",
    attention_norm="ln_1",
    q="attn.c_attn",
    k="attn.c_attn",
    v="attn.c_attn",
    out="attn.c_proj",
    mlp_norm="ln_2",
    gate="mlp.w2",
    up="mlp.w1",
    down="mlp.c_proj",
    spellings=(),
    ignored=("transformer.rotary_emb.inv_freq",),
)
_FIELDS: Fields = (
    IDS
    | LAYERS
    | {
        "vocab_size": ("vocab_size", "size"),
        "norm_eps": ("layer_norm_epsilon", "number", ..., 0.0),
        "rope_theta": ("rotary_emb_base", "number", 10_000.0, 1.0),
        "max_position_embeddings": ("seq_length", "size"),
    }
)
_FIXED = dict(rotary_pct=1.0, no_bias=True, scale_attn_weights=True, tie_word_embeddings=False)
# Options of precision, of equivalent faster kernels, of dropout, and of code that is never executed.
_IDLE = (
    "bf16", "fp16", "fp32", "attn_dropout_prob", "emb_dropout_prob", "onnx_safe",
    "use_cache_quantization", "use_cache_kernel", "softmax_in_fp32",
)  # fmt: skip


def from_hf_config(values: dict) -> DecoderConfig:
    """Reads config.json of QWenLMHeadModel without `visual`; every option is honoured or refused by name."""
    what = f"config.json of {architecture(values, ARCHITECTURE)}"
    options = ConfigOptions(values, what)
    if "visual" in options:
        raise ConfigError(
            f"{what} with a part 'visual', which makes it Qwen-VL",
            "a language model alone",
            "read the whole model with mllm_jax.from_pretrained, or its image encoder with "
            "architectures=['QWenVisionTransformer']",
        )
    read = read_fields(options, _FIELDS)
    options.divided("hidden_size", "num_attention_heads")
    options.only("kv_channels", read["hidden_size"] // read["num_heads"])
    for name, value in _FIXED.items():
        options.only(name, value)
    stretched = options.only("use_dynamic_ntk", True, False)
    options.only("use_logn_attn", stretched)
    # The size of a table that does not exist: rotary positions are unlimited.
    options.skip("max_position_embeddings", *_IDLE)
    config = make_config(
        DecoderConfig,
        **read,
        num_kv_heads=read["num_heads"],
        mlp_size=options.size("intermediate_size") // 2,
        tie_word_embeddings=False,
        qkv_bias=True,
        longest=read["max_position_embeddings"] if stretched else None,
        family=ARCHITECTURE,
    )
    options.done()
    return config


def to_hf_config(config: DecoderConfig) -> dict:
    """Returns config.json, the inverse of `from_hf_config`; refuses switches that the family does not have."""
    c = config
    written = dict(
        **kind_of(ARCHITECTURE),
        kv_channels=c.size_per_head,
        intermediate_size=2 * c.mlp_size,
        use_dynamic_ntk=c.dialect.longest is not None,
        use_logn_attn=c.dialect.longest is not None,
        max_position_embeddings=c.max_position_embeddings,
        **_FIXED,
        **write_fields(c, _FIELDS),
    )
    return faithful(c, written, from_hf_config)


table = partial(decoder_table, names=_NAMES)


FAMILIES = families(
    {ARCHITECTURE: "Qwen (first)"},
    from_hf=from_hf_config,
    to_hf=to_hf_config,
    table=table,
    sample=token_sample,
    oracle="Qwen2ForCausalLM with the weights renamed",
)
