"""Qwen2 and Qwen2.5 (arXiv 2407.10671, 2412.15115) and Qwen3 (arXiv 2505.09388).

They are LLaMA with biases of q, k and v (Qwen2) or a norm of each head's queries and keys (Qwen3). The last layers may
have a sliding window.
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
    vocab_size=151936,
    hidden_size=4096,
    intermediate_size=22016,
    num_hidden_layers=32,
    num_attention_heads=32,
    num_key_value_heads=32,
    hidden_act="silu",
    max_position_embeddings=32768,
    rms_norm_eps=1e-6,
    tie_word_embeddings=False,
    use_sliding_window=False,
    sliding_window=4096,
    max_window_layers=28,
)
MOST_LAYERS = 10_000  # of a list with the kind of each layer
_DEFAULTS = {"Qwen2ForCausalLM": _BOTH, "Qwen3ForCausalLM": _BOTH | dict(head_dim=128, attention_bias=False)}


def from_hf_config(values: dict) -> DecoderConfig:
    """Reads config.json of Qwen2ForCausalLM or Qwen3ForCausalLM; every option is honoured or refused by name."""
    family = architecture(values, *_DEFAULTS)
    what = f"config.json of {family}"
    options = ConfigOptions(_DEFAULTS[family] | values, what)
    switches = _read_windows(options)
    if family == "Qwen2ForCausalLM":
        options.only("use_mrope", False)
        switches |= dict(qkv_bias=True)
    else:
        bias = options.flag("attention_bias")
        switches |= dict(qkv_bias=bias, out_bias=bias, qk_norm=True)
    return read_decoder(options, what, family=family, **switches)


def to_hf_config(config: DecoderConfig) -> dict:
    """Returns config.json, the inverse of `from_hf_config`; refuses switches that the family does not have."""
    written = write_decoder(config) | _write_windows(config)
    if config.family != "Qwen2ForCausalLM":
        written |= dict(attention_bias=config.dialect.qkv_bias)
    return faithful(config, written, from_hf_config)


def _read_windows(options: ConfigOptions) -> dict:
    """Reads the sliding window and the layers that have it."""
    window, first = options.size("sliding_window", None), options.count("max_window_layers")
    layers, kinds = options.size("num_hidden_layers"), options.texts("layer_types", None)
    if not options.flag("use_sliding_window"):
        window = None
    if kinds is None:
        if window is None or first >= layers:
            return dict(sliding_window=None)
        if first == 0:
            return dict(sliding_window=window, layer_types=())
        layers = options.size("num_hidden_layers", most=MOST_LAYERS)
        kinds = ("full_attention",) * first + ("sliding_attention",) * (layers - first)
    if len(kinds) != layers:
        raise ConfigError(
            f"layer_types of {len(kinds)} layers", f"num_hidden_layers={layers} of them", "restore it from its origin"
        )
    if set(kinds) == {"full_attention"}:
        return dict(sliding_window=None)
    alike = set(kinds) == {"sliding_attention"} and window is not None
    return dict(sliding_window=window, layer_types=() if alike else kinds)


def _write_windows(c: DecoderConfig) -> dict:
    kinds = ["full_attention" if window is None else "sliding_attention" for window in c.windows]
    return dict(
        use_sliding_window="sliding_attention" in kinds,
        sliding_window=c.dialect.sliding_window,
        max_window_layers=(*kinds, "sliding_attention").index("sliding_attention"),
        layer_types=kinds,
    )


table = decoder_table

FAMILIES = families(
    {"Qwen2ForCausalLM": "Qwen2, Qwen2.5", "Qwen3ForCausalLM": "Qwen3"},
    from_hf=from_hf_config,
    to_hf=to_hf_config,
    table=table,
    sample=token_sample,
)
