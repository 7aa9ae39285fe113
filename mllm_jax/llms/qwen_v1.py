"""The first Qwen (arXiv 2309.16609): LLaMA with biases of q, k and v, which lie in one tensor, and other names.

Its code stretches texts beyond the trained length in two ways of its own, `use_dynamic_ntk` (a raised rotary base, by
whole doublings of the first chunk's length) and `use_logn_attn` (queries scaled by the logarithm of their place). Up to
`seq_length` tokens neither does anything. Longer texts are refused; where only the positions tell, logits are NaN.
"""

from __future__ import annotations

from mllm_jax.checkpoints.architectures import architecture, model_type
from mllm_jax.checkpoints.options import Options
from mllm_jax.checkpoints.sample import token_sample
from mllm_jax.checkpoints.table import Family, Table
from mllm_jax.errors import ConfigError
from mllm_jax.llms.decoder import DecoderConfig
from mllm_jax.llms.hub import Names, decoder_table, faithful, read_ids, write_ids

ARCHITECTURE = "QWenLMHeadModel"
# The MLP is c_proj(w1(x) * silu(w2(x))).
_NAMES = Names(
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
# Of precision, of faster kernels that give the same, of dropout; and the code that is never executed.
_IDLE = (
    "bf16", "fp16", "fp32", "attn_dropout_prob", "emb_dropout_prob", "onnx_safe",
    "use_cache_quantization", "use_cache_kernel", "softmax_in_fp32",
)  # fmt: skip


def from_hf_config(values: dict) -> DecoderConfig:
    """config.json of QWenLMHeadModel without `visual`, every option honoured or refused by name."""
    what = f"config.json of {architecture(values, ARCHITECTURE)}"
    options = Options(values, what)
    if "visual" in options:
        raise ConfigError(
            f"{what} with a part 'visual', which makes it Qwen-VL",
            "a language model alone",
            "read the whole with mllm_jax.from_pretrained, or its tower with architectures=['QWenVisionTransformer']",
        )
    width, heads = options.size("hidden_size"), options.size("num_attention_heads")
    options.divided("hidden_size", "num_attention_heads")
    options.only("kv_channels", width // heads)
    options.only("rotary_pct", 1.0)
    options.only("no_bias", True)
    options.only("scale_attn_weights", True)
    options.only("tie_word_embeddings", False)
    stretched = options.only("use_dynamic_ntk", True, False)
    options.only("use_logn_attn", stretched)
    trained = options.size("seq_length")
    # The table of positions that nobody has: rotary positions have no end.
    options.skip("max_position_embeddings", *_IDLE)
    read = DecoderConfig(
        vocab_size=options.size("vocab_size"),
        hidden_size=width,
        num_layers=options.size("num_hidden_layers"),
        num_heads=heads,
        num_kv_heads=heads,
        mlp_size=options.size("intermediate_size") // 2,
        norm_eps=options.number("layer_norm_epsilon", least=0.0),
        rope_theta=options.number("rotary_emb_base", 10_000.0, least=1.0),
        tie_word_embeddings=False,
        qkv_bias=True,
        max_position_embeddings=trained,
        longest=trained if stretched else None,
        family=ARCHITECTURE,
        **read_ids(options),
    )
    options.done()
    return read


def to_hf_config(config: DecoderConfig) -> dict:
    """The reverse; refuses switches that the family does not have."""
    c = config
    written = dict(
        architectures=[ARCHITECTURE],
        model_type=model_type(ARCHITECTURE),
        vocab_size=c.vocab_size,
        hidden_size=c.hidden_size,
        num_hidden_layers=c.num_layers,
        num_attention_heads=c.num_heads,
        kv_channels=c.size_per_head,
        intermediate_size=2 * c.mlp_size,
        layer_norm_epsilon=c.norm_eps,
        rotary_emb_base=c.rope_theta,
        rotary_pct=1.0,
        no_bias=True,
        scale_attn_weights=True,
        tie_word_embeddings=False,
        use_dynamic_ntk=c.longest is not None,
        use_logn_attn=c.longest is not None,
        seq_length=c.max_position_embeddings,
        max_position_embeddings=c.max_position_embeddings,
        **write_ids(c),
    )
    return faithful(c, written, from_hf_config)


def table(config: DecoderConfig) -> Table:
    """q, k and v lie in one tensor, one after the other."""
    return decoder_table(config, _NAMES)


FAMILIES = (
    Family(
        name="Qwen (first)",
        architectures=(ARCHITECTURE,),
        from_hf=from_hf_config,
        to_hf=to_hf_config,
        table=table,
        sample=token_sample,
        oracle="Qwen2ForCausalLM with the weights renamed",
    ),
)
