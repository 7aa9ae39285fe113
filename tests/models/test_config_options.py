"""config.json of every family: unused options in every nested part, wrong types and sizes, missing layers."""

from __future__ import annotations

import copy
import json
import os
import time
import tracemalloc

import numpy as np
import pytest
from fuzzing._configs import CONFIGS
from safetensors.numpy import save_file

from mllm_jax import from_pretrained, pretrained_config, supported_models
from mllm_jax.errors import CheckpointError, ConfigError
from mllm_jax.models.registry import family_of

# Options that transformers 4.27 wrote into every nested config, as in blip2-opt-2.7b and instructblip-vicuna-7b.
DUMP_OF_2023 = json.loads("""{
    "_name_or_path": "", "add_cross_attention": false, "architectures": null, "bad_words_ids": null,
    "begin_suppress_tokens": null, "chunk_size_feed_forward": 0, "cross_attention_hidden_size": null,
    "decoder_start_token_id": null, "diversity_penalty": 0.0, "do_sample": false, "early_stopping": false,
    "encoder_no_repeat_ngram_size": 0, "exponential_decay_length_penalty": null, "finetuning_task": null,
    "forced_bos_token_id": null, "forced_eos_token_id": null, "id2label": {"0": "LABEL_0", "1": "LABEL_1"},
    "is_decoder": false, "label2id": {"LABEL_0": 0, "LABEL_1": 1}, "length_penalty": 1.0, "max_length": 20,
    "min_length": 0, "no_repeat_ngram_size": 0, "num_beam_groups": 1, "num_beams": 1, "num_return_sequences": 1,
    "output_attentions": false, "output_hidden_states": false, "output_scores": false, "prefix": null,
    "problem_type": null, "pruned_heads": {}, "remove_invalid_values": false, "repetition_penalty": 1.0,
    "return_dict": true, "return_dict_in_generate": false, "sep_token_id": null, "suppress_tokens": null,
    "task_specific_params": null, "temperature": 1.0, "tf_legacy_loss": false, "tie_encoder_decoder": false,
    "tokenizer_class": null, "top_k": 50, "top_p": 1.0, "torch_dtype": "float16", "torchscript": false,
    "transformers_version": "4.27.0.dev0", "typical_p": 1.0, "use_bfloat16": false, "layer_norm_eps": null,
    "initializer_range": 0.02, "attention_dropout": 0.0
}""")
SIZES = ("hidden_size", "num_attention_heads", "num_hidden_layers", "num_layers", "num_heads", "vocab_size", "d_model")
SIZES += ("intermediate_size", "patch_size", "image_size", "depth", "embed_dim", "max_position_embeddings")
SIZES += ("encoder_layers", "encoder_ffn_dim", "encoder_embed_dim", "num_mel_bins", "max_source_positions")
SIZES += ("in_channels", "latent_channels", "norm_num_groups", "layers_per_block")
SIZES += ("n_embd", "n_layer", "n_head", "n_positions", "n_inner")
SIZES += ("text_encoder_dim", "text_encoder_1_dim", "langauge_model_dim")
SIZES += ("model_in_dim", "upsample_initial_channel", "sampling_rate")


def read(values: dict):
    return family_of(values).from_hf(values)


def parts(values: dict):
    """Returns every nested config and the whole; timm's and Qwen-VL's files have other forms than transformers'."""
    yield values
    for name, part in values.items():
        if name.endswith("_config") or name.endswith("_config_dict"):
            yield part


def transformers_configs():
    return [name for name in CONFIGS if "nfnet" not in name and "eva" not in name]


def test_every_family_is_here():
    # A pipeline is a folder of several configs.
    models = [model for model in supported_models() if not model.architectures[0].endswith("Pipeline")]
    names = {name for model in models for name in model.architectures}
    kinds = {family_of(values).name for values in CONFIGS.values()}
    assert kinds == {model.name for model in models} and CONFIGS.keys() - {"ChatGLM2"} <= names


@pytest.mark.parametrize("name", transformers_configs())
def test_every_default_of_generation_in_every_nested_part_changes_nothing(name):
    values = copy.deepcopy(CONFIGS[name])
    for part in list(parts(values)):
        for option, value in DUMP_OF_2023.items():
            part.setdefault(option, value)
    assert read(values) == read(CONFIGS[name])


@pytest.mark.parametrize("name", CONFIGS)
def test_a_forgotten_option_in_any_part_is_named(name):
    for i in range(len(list(parts(CONFIGS[name])))):
        values = copy.deepcopy(CONFIGS[name])
        part = list(parts(values))[i]
        if "architecture" in part:
            part = part["model_args"]
        part["surprise_factor"] = 0.5
        replaced = name == "CLIPModel" and part is values["text_config"]  # text_config_dict takes precedence
        ignored = part is values.get("pretrained_cfg") or (
            part is values and (name.startswith("Qwen") and "Vision" not in name and "CausalLM" not in name)
        )
        if not replaced and not ignored:
            with pytest.raises(ConfigError, match="surprise_factor=0.5"):
                read(values)


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("value", [0, -1, "4", 2.5, True, [[]], float("nan"), float("inf"), 1e308, 10**12])
def test_sizes_that_are_none_are_named(name, value):
    tried = 0
    for i, part in enumerate(list(parts(CONFIGS[name]))):
        for option in SIZES:
            if option in part:
                values = copy.deepcopy(CONFIGS[name])
                list(parts(values))[i][option] = value
                if name == "CLIPModel" and i == 1:  # text_config; text_config_dict takes precedence
                    continue
                if name == "QWenLMHeadModel" and option == "max_position_embeddings":
                    continue
                with pytest.raises(ConfigError, match=f"{option}="):
                    read(values)
                tried += 1
    assert tried >= 3 or "nfnet" in name or "eva" in name or "Visual" in name or name == "QWenVisionTransformer"


@pytest.mark.parametrize(
    "name,change,message",
    [
        ("LlamaForCausalLM", dict(num_attention_heads=3, head_dim=None), "num_attention_heads=3"),
        ("LlamaForCausalLM", dict(num_key_value_heads=3), "num_key_value_heads=3"),
        ("LlamaForCausalLM", dict(eos_token_id=[[]]), "eos_token_id="),
        ("LlamaForCausalLM", dict(tie_word_embeddings=1), "tie_word_embeddings=1"),
        ("LlamaForCausalLM", dict(rms_norm_eps="1e-6"), "rms_norm_eps='1e-6'"),
        ("LlamaForCausalLM", dict(rope_theta=0), "rope_theta=0"),
        ("LlamaForCausalLM", dict(rope_scaling=[1]), "rope_scaling="),
        ("LlamaForCausalLM", dict(rope_scaling=dict(rope_type="linear", factor=0)), "factor=0"),
        (
            "LlamaForCausalLM",
            dict(rope_scaling=dict(rope_type="llama3", factor=8, low_freq_factor=4, high_freq_factor=4)),
            "low_freq_factor=4",
        ),
        ("Qwen2ForCausalLM", dict(layer_types=["full_attention"] * 3), "layer_types"),
        ("Qwen2ForCausalLM", dict(layer_types=[[]] * 2), "layer_types="),
        ("OPTForCausalLM", dict(num_attention_heads=3), "num_attention_heads=3"),
        ("ViTModel", dict(num_attention_heads=3), "3 heads"),
        ("CLIPTextModel", dict(num_attention_heads=3), "3 heads"),
        ("ViTModel", dict(image_size=[16, 8]), r"image_size=\[16, 8\]"),
        ("Blip2ForConditionalGeneration", dict(text_config=1), "text_config=1"),
        ("Blip2ForConditionalGeneration", dict(qformer_config=[]), "qformer_config="),
        ("CLIPModel", dict(vision_config="a"), "vision_config='a'"),
        ("LlavaForConditionalGeneration", dict(text_config=1), "text_config=1"),
        ("LlavaForConditionalGeneration", dict(vision_feature_layer=-9), "vision_feature_layer="),
        ("LlavaNextForConditionalGeneration", dict(image_grid_pinpoints=[[16]]), "image_grid_pinpoints="),
        ("InternVLForConditionalGeneration", dict(downsample_ratio=0), "downsample_ratio=0"),
        ("Qwen2_5_VLForConditionalGeneration", dict(text_config=[]), "text_config="),
        ("T5ForConditionalGeneration", dict(relative_attention_max_distance=10**9), "relative_attention_max_distance="),
    ],
)
def test_wrong_options_are_named(name, change, message):
    with pytest.raises(ConfigError, match=message):
        read(CONFIGS[name] | change)


@pytest.mark.parametrize(
    "name", ["LlamaForCausalLM", "Qwen2ForCausalLM", "SamVisionModel", "T5ForConditionalGeneration"]
)
@pytest.mark.parametrize("layers", [1_000, 10_000_000])
def test_layers_are_bounded_by_the_stored_tensors(name, layers, tmp_path):
    """Checks the bound before anything is allocated for each layer."""
    option = "num_layers" if name.startswith("T5") else "num_hidden_layers"
    (tmp_path / "config.json").write_text(json.dumps(CONFIGS[name] | {option: layers}))
    save_file({"model.layers.1.x": np.zeros(1, np.float32)}, tmp_path / "model.safetensors")
    tracemalloc.start()
    begun = time.process_time()
    try:
        with pytest.raises(CheckpointError, match=f"num_layers={layers:,} .*at most 2 layers"):
            from_pretrained(tmp_path)
        assert tracemalloc.get_traced_memory()[1] < 50 << 20 and time.process_time() - begun < 10
    finally:
        tracemalloc.stop()


def test_sizes_beyond_the_stored_tensors_allocate_nothing(tmp_path):
    values = CONFIGS["LlamaForCausalLM"] | dict(vocab_size=2**31 - 1, hidden_size=2**20, intermediate_size=2**30)
    (tmp_path / "config.json").write_text(json.dumps(values | dict(head_dim=None)))
    save_file({"model.layers.1.x": np.zeros(1, np.float32)}, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match="model.embed_tokens.weight: missing"):
        from_pretrained(tmp_path)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "model.safetensors.index.json"])
@pytest.mark.parametrize("kind", ["fifo", "device", "folder", "nested"])
def test_no_other_kind_of_file_is_waited_for_or_read(name, kind, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(CONFIGS["LlamaForCausalLM"]))
    path = tmp_path / name
    path.unlink(missing_ok=True)
    if kind == "fifo":
        os.mkfifo(path)
    elif kind == "device":
        path.symlink_to("/dev/zero")
    elif kind == "folder":
        path.mkdir()
    else:
        text = b"[" * 100_000
        path.write_bytes(len(text).to_bytes(8, "little") + text if name == "model.safetensors" else text)
    with pytest.raises(CheckpointError):
        from_pretrained(tmp_path)
    with pytest.raises(CheckpointError):
        pretrained_config(tmp_path)


def test_glm4s_first_folders_multiply_the_base():
    """Checks glm-4-9b-chat's config.json; with ChatGLM2's vocabulary the meaning of the option is unknown."""
    values = CONFIGS["ChatGLM2"] | dict(rope_ratio=500, num_hidden_layers=2)
    assert read(values | dict(padded_vocab_size=151_552)).dialect.rope_theta == 5_000_000
    assert read(CONFIGS["ChatGLM2"]).dialect.rope_theta == 10_000
    with pytest.raises(ConfigError, match="rope_ratio=500"):
        read(values)


def test_experts_that_internvl_lists_and_does_not_have():
    values = CONFIGS["InternVisionModel"] | dict(use_moe=False, num_experts=8, noisy_gate_policy="RSample_before")
    assert read(values) == read(CONFIGS["InternVisionModel"])
    with pytest.raises(ConfigError, match="use_moe=True"):
        read(values | dict(use_moe=True))
