"""config.json of each decoder: read in both spellings, written again; options are applied or refused by name."""

from __future__ import annotations

from dataclasses import replace

import pytest

from mllm_jax.checkpoints.fields import change_fields
from mllm_jax.errors import ConfigError
from mllm_jax.layers.compute import Compute
from mllm_jax.layers.rotary import RopeScaling
from mllm_jax.llms import glm, llama, opt, qwen
from mllm_jax.llms.decoder import DecoderConfig

HOMES = {
    "LlamaForCausalLM": llama,
    "MistralForCausalLM": llama,
    "Qwen2ForCausalLM": qwen,
    "Qwen3ForCausalLM": qwen,
    "GlmForCausalLM": glm,
    "OPTForCausalLM": opt,
}
ROTARY = [name for name in HOMES if name != "OPTForCausalLM"]
CHATGLM2 = dict(
    architectures=["ChatGLMModel"],
    model_type="chatglm",
    num_layers=2,
    padded_vocab_size=56,
    hidden_size=48,
    ffn_hidden_size=68,
    kv_channels=12,
    num_attention_heads=4,
    multi_query_attention=True,
    multi_query_group_num=2,
    seq_length=64,
    layernorm_epsilon=1e-5,
    add_qkv_bias=True,
)


def read(family: str, **options) -> DecoderConfig:
    return HOMES[family].from_hf_config(dict(architectures=[family], num_hidden_layers=4) | options)


@pytest.mark.parametrize("family", HOMES)
def test_defaults_are_those_of_the_reference(family):
    import transformers

    written = getattr(transformers, family.replace("ForCausalLM", "Config"))(num_hidden_layers=4).to_dict()
    assert read(family) == read(family, **{k: v for k, v in written.items() if k != "architectures"})
    # Parts of a config.json that describe a language model may have only model_type.
    assert read(family) == read(family, architectures=None, model_type=written["model_type"])


@pytest.mark.parametrize("family", HOMES)
def test_writing_is_the_reverse_of_reading(family):
    home, config = HOMES[family], read(family, bos_token_id=None, eos_token_id=[4, 5], pad_token_id=6)
    assert config.eos_token_id == (4, 5) and config.family == family
    assert home.from_hf_config(home.to_hf_config(config)) == config
    # Compute settings are not stored; heads may be given in full.
    run = replace(config, compute=Compute(dtype="bfloat16", remat="full", scan_unroll=2), head_dim=config.size_per_head)
    assert home.from_hf_config(home.to_hf_config(run)) == config


@pytest.mark.parametrize("family", ROTARY)
def test_rotary_options_in_both_spellings(family):
    yarn = dict(factor=4.0, original_max_position_embeddings=64, mscale=0.5, mscale_all_dim=0.7, truncate=False)
    new = read(family, rope_parameters=dict(rope_type="yarn", rope_theta=5e5, **yarn))
    assert new.dialect.rope_theta == 5e5 and new.dialect.rope_scaling == RopeScaling("yarn", **yarn)
    for kind in ("type", "rope_type"):
        assert read(family, rope_theta=5e5, rope_scaling={kind: "yarn"} | yarn) == new
    assert read(family, rope_theta=5e5).dialect.rope_scaling == RopeScaling()
    assert read(family, rope_scaling=None, rope_parameters=None).dialect.rope_theta == 10_000.0
    # Missing values come from the longest text.
    for kind, factors in (("llama3", dict(low_freq_factor=1.0, high_freq_factor=4.0)), ("dynamic", {})):
        scaled = read(family, max_position_embeddings=77, rope_scaling=dict(type=kind, factor=2.0, **factors))
        assert scaled.dialect.rope_scaling.original_max_position_embeddings == 77
        assert HOMES[family].from_hf_config(HOMES[family].to_hf_config(scaled)) == scaled
    ratio = dict(rope_type="yarn", factor=None, original_max_position_embeddings=32)
    assert read(family, max_position_embeddings=96, rope_parameters=ratio).dialect.rope_scaling.factor == 3.0


@pytest.mark.parametrize("family", HOMES)
@pytest.mark.parametrize("option", ["parallel_attention", "quantization_config", "logit_scale"])
def test_an_option_that_nobody_knows_is_refused(family, option):
    with pytest.raises(ConfigError, match=f"{family} with {option}="):
        read(family, **{option: 3})


@pytest.mark.parametrize(
    "families,options,message",
    [
        (ROTARY, dict(hidden_act="tanh"), "hidden_act='tanh'"),
        (["OPTForCausalLM"], dict(activation_function="tanh"), "activation_function='tanh'"),
        (ROTARY, dict(rope_scaling=dict(type="longrope", factor=2.0)), "type='longrope'"),
        (ROTARY, dict(rope_parameters=dict(rope_type="longrope", short_factor=[1.0])), "rope_type='longrope'"),
        (ROTARY, dict(rope_scaling=dict(type="mrope", mrope_section=[2, 3])), "type='mrope'"),
        (ROTARY, dict(rope_scaling=dict(type="linear", factor=2.0, alpha=1)), "rope options.*alpha=1"),
        (ROTARY, dict(rope_scaling=dict(type="linear")), "without 'factor'"),
        (ROTARY, dict(rope_scaling=dict(type="llama3", factor=2.0, low_freq_factor=1.0)), "without 'high_freq_factor'"),
        (ROTARY, dict(rope_parameters=dict(full_attention=dict(rope_type="default"))), "full_attention="),
        (ROTARY[:-1], dict(partial_rotary_factor=0.5), "partial_rotary_factor=0.5"),
        (["LlamaForCausalLM"], dict(rope_interleaved=True), "rope_interleaved=True"),
        (["LlamaForCausalLM"], dict(sliding_window=5), "sliding_window=5"),
        (["MistralForCausalLM", "Qwen2ForCausalLM"], dict(attention_bias=True), "attention_bias=True"),
        (["MistralForCausalLM"], dict(layer_types=["full_attention"] * 4), "layer_types="),
        (["Qwen2ForCausalLM"], dict(use_mrope=True), "use_mrope=True"),
        (
            ["Qwen2ForCausalLM", "Qwen3ForCausalLM"],
            dict(layer_types=["sliding_attention"] * 4),
            "no dialect.sliding_window",
        ),
        (["Qwen3ForCausalLM"], dict(layer_types=["chunked_attention"] * 4), "chunked_attention"),
        (["GlmForCausalLM"], dict(mlp_bias=True), "mlp_bias=True"),
        (list(HOMES), dict(architectures=["FalconForCausalLM"]), "FalconForCausalLM"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_options_are_refused_by_name(families, options, message):
    for family in families:
        with pytest.raises(ConfigError, match=f"(?s){message}"):
            read(family, **options)


def test_windows_of_qwen():
    sliding, full = "sliding_attention", "full_attention"
    late = read("Qwen2ForCausalLM", use_sliding_window=True, sliding_window=7, max_window_layers=3)
    assert late.windows == (None, None, None, 7)
    written = qwen.to_hf_config(late)
    assert (written["max_window_layers"], written["layer_types"]) == (3, [full, full, full, sliding])
    assert read("Qwen3ForCausalLM", use_sliding_window=True, max_window_layers=0).windows == (4096,) * 4
    assert read("Qwen3ForCausalLM", sliding_window=7, max_window_layers=0).windows == (None,) * 4
    assert read("MistralForCausalLM").windows == (4096,) * 4
    assert read("MistralForCausalLM", sliding_window=None).windows == (None,) * 4


@pytest.mark.parametrize(
    "family,change,message",
    [
        ("LlamaForCausalLM", dict(qkv_bias=True), "out_bias=False"),
        ("LlamaForCausalLM", dict(qk_norm=True), "qk_norm=True"),
        ("LlamaForCausalLM", dict(sliding_window=9), "sliding_window=9"),
        ("LlamaForCausalLM", dict(partial_rotary_factor=0.5), "partial_rotary_factor=0.5"),
        ("LlamaForCausalLM", dict(hidden_size=4098, head_dim=128), "4098 and 32 heads"),
        ("MistralForCausalLM", dict(mlp_bias=True), "mlp_bias=True"),
        ("Qwen2ForCausalLM", dict(qkv_bias=False), "qkv_bias=False"),
        ("Qwen3ForCausalLM", dict(positions="learned"), "positions='learned'"),
        ("GlmForCausalLM", dict(rotary_interleaved=False), "rotary_interleaved=False"),
        ("GlmForCausalLM", dict(eos_token_id=()), r"eos_token_id=\(\)"),
        ("OPTForCausalLM", dict(norm_eps=1e-6), "norm_eps=1e-06"),
        ("OPTForCausalLM", dict(mlp_bias=False), "mlp_bias=False"),
        ("OPTForCausalLM", dict(num_kv_heads=4), "num_kv_heads=4"),
    ],
)
def test_switches_that_a_family_does_not_have_are_not_written(family, change, message):
    with pytest.raises(ConfigError, match=message):
        HOMES[family].to_hf_config(change_fields(read(family), **change))


def test_a_decoder_of_our_own_is_written_as_llama():
    config = DecoderConfig(vocab_size=300, mimetic_init=True)
    assert llama.from_hf_config(llama.to_hf_config(config)) == replace(config, mimetic_init=False)


def test_chatglm2_is_read_as_glm():
    config = glm.from_chatglm_config(CHATGLM2)
    assert config.family == "GlmForCausalLM" and (config.num_kv_heads, config.dialect.partial_rotary_factor) == (2, 0.5)
    assert config.dialect.qkv_bias and config.dialect.rotary_interleaved and config.max_position_embeddings == 64
    assert glm.from_chatglm_config(CHATGLM2 | dict(multi_query_attention=False)).num_kv_heads == 4
    assert glm.from_hf_config(glm.to_hf_config(config)) == config


@pytest.mark.parametrize(
    "option",
    ["rope_ratio", "pre_seq_len", "quantization_bit", "add_bias_linear", "position_encoding_2d"],
)
def test_options_of_chatglm2_are_refused_by_name(option):
    with pytest.raises(ConfigError, match=f"ChatGLM2.*{option}="):
        glm.from_chatglm_config(CHATGLM2 | {option: 50})
    with pytest.raises(ConfigError, match="original_rope=False"):
        glm.from_chatglm_config(CHATGLM2 | dict(original_rope=False))
