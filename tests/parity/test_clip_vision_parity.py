"""CLIP's vision encoder against CLIPVisionModel."""

from __future__ import annotations

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from vision_checks import check_transformers, family_of, make_image, read, to_torch

from mllm_jax.encoders import clip_vision
from mllm_jax.errors import ConfigError

FAMILY = family_of(clip_vision, "CLIPVisionModel")
SIZES = dict(
    hidden_size=32, num_hidden_layers=3, num_attention_heads=2, intermediate_size=44, image_size=20, patch_size=4
)
CASES = {
    "openai": {},  # quick GELU
    "laion": dict(hidden_act="gelu", layer_norm_eps=0.1),
    "remainder": dict(hidden_act="gelu_pytorch_tanh", image_size=23, num_attention_heads=8),
}


def make(randomise, case: str):
    config = transformers.CLIPVisionConfig(**SIZES | CASES[case], attn_implementation="eager")
    return randomise(transformers.CLIPVisionModel(config))


@pytest.mark.parametrize("case", CASES)
def test_outputs_and_folders(case, randomise, assert_close, tmp_path):
    sizes = [(20, 20), (16, 30), (8, 12)]
    module, _ = check_transformers(
        make(randomise, case), FAMILY, tmp_path, assert_close, sizes, interpolate_pos_encoding=True
    )
    assert set(load_file(tmp_path / "ours" / "model.safetensors")) >= {"vision_model.pre_layrnorm.weight"}


def test_names_of_the_hub_are_read(randomise, assert_close, tmp_path):
    """Checks folders of transformers 4: `vision_model.` before every name, and stored indices of the positions."""
    reference = make(randomise, "openai")
    reference.save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    tensors = {f"vision_model.{name}": tensor for name, tensor in load_file(file).items()}
    save_file(tensors | {"vision_model.embeddings.position_ids": torch.arange(26)[None].float()}, file)
    module, params = read(FAMILY, tmp_path)
    with torch.no_grad():
        theirs = reference(to_torch(make_image(20, 20)))
    ours = module.apply({"params": params}, make_image(20, 20))
    assert_close(ours.pooler_output, theirs.pooler_output, 1e-4)


def test_the_old_options_of_vision_encoders_are_known_and_new_ones_refused():
    """Checks the `vision_config` of openai/clip-vit-large-patch14-336, which repeats every default of its time."""
    old = dict(
        add_cross_attention=False, attention_dropout=0.0, bad_words_ids=None, bos_token_id=None,
        chunk_size_feed_forward=0, diversity_penalty=0.0, do_sample=False, dropout=0.0, early_stopping=False,
        encoder_no_repeat_ngram_size=0, hidden_act="quick_gelu", hidden_size=1024, id2label={"0": "LABEL_0"},
        image_size=336, initializer_factor=1.0, initializer_range=0.02, intermediate_size=4096, is_decoder=False,
        is_encoder_decoder=False, layer_norm_eps=1e-05, length_penalty=1.0, max_length=20, min_length=0,
        model_type="clip_vision_model", no_repeat_ngram_size=0, num_attention_heads=16, num_beam_groups=1,
        num_beams=1, num_hidden_layers=24, num_return_sequences=1, output_attentions=False,
        output_hidden_states=False, output_scores=False, patch_size=14, projection_dim=768, pruned_heads={},
        remove_invalid_values=False, repetition_penalty=1.0, return_dict=True, return_dict_in_generate=False,
        temperature=1.0, tie_encoder_decoder=False, tie_word_embeddings=True, top_k=50, top_p=1.0, torchscript=False,
        transformers_version="4.21.3", typical_p=1.0, use_bfloat16=False,
    )  # fmt: skip
    c = FAMILY.from_hf(old)
    assert (c.side, c.num_layers, c.activation) == (24, 24, "quick_gelu")
    for option in (dict(pruned_heads={"0": [1]}), dict(qk_norm=True), dict(patch_size=[14, 16])):
        with pytest.raises(ConfigError, match=next(iter(option))):
            FAMILY.from_hf(old | option)
