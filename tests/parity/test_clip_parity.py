"""Dual encoders against CLIPModel and SiglipModel through real folders both ways, and the gradients of their losses."""

from __future__ import annotations

import json
from copy import deepcopy

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from einops import rearrange
from toy_data import quick_compilation

from mllm_jax.checkpoints.hf import hub_tensors
from mllm_jax.errors import ConfigError
from mllm_jax.models.registry import family_of, family_of_config, from_pretrained, save_pretrained
from mllm_jax.training.objectives.contrastive import Contrastive

VISION = dict(
    hidden_size=24,
    intermediate_size=40,
    num_hidden_layers=2,
    num_attention_heads=3,
    image_size=20,
    patch_size=5,
    layer_norm_eps=1e-2,  # large, so that a wrong epsilon shows
)
TEXT = dict(
    vocab_size=61,
    hidden_size=32,
    intermediate_size=52,
    num_hidden_layers=3,
    num_attention_heads=2,
    max_position_embeddings=10,
    layer_norm_eps=1e-2,
    bos_token_id=58,
    eos_token_id=59,
    pad_token_id=1,
)
SAME = TEXT | dict(hidden_size=24, num_attention_heads=3)
CASES = {
    "clip": ("CLIP", VISION, TEXT, dict(projection_dim=12)),
    "clip gelu": ("CLIP", VISION | dict(hidden_act="gelu"), TEXT | dict(eos_token_id=2), dict(projection_dim=40)),
    "clip mixed": ("CLIP", VISION | dict(patch_size=4), SAME | dict(hidden_act="gelu"), dict(projection_dim=24)),
    "siglip": ("Siglip", VISION, SAME, {}),
    "siglip other widths": ("Siglip", VISION | dict(num_attention_heads=2), TEXT | dict(projection_size=24), {}),
    "siglip gelu": ("Siglip", VISION | dict(hidden_act="gelu", patch_size=10), SAME | dict(hidden_act="gelu"), {}),
}
MEAN, STD = (0.3, 0.5, 0.6), (0.2, 0.3, 0.25)


@pytest.fixture(autouse=True)
def _quickly():
    with quick_compilation():
        yield


@pytest.fixture
def load(randomise, tmp_path):
    def make(case: str):
        name, vision, text, options = CASES[case]
        config = getattr(transformers, f"{name}Config")(
            vision_config=deepcopy(vision), text_config=deepcopy(text), **options
        )
        reference = getattr(transformers, f"{name}Model")._from_config(config, attn_implementation="eager").eval()
        for seed, part in enumerate(reference.children()):
            randomise(part, seed)
        with torch.no_grad():
            reference.logit_scale.fill_(1.3)
            if name == "Siglip":
                reference.logit_bias.fill_(-0.7)
        reference.save_pretrained(tmp_path / "theirs")
        return reference, *from_pretrained(tmp_path / "theirs")

    return make


def texts(rows: int) -> np.ndarray:
    rng = np.random.default_rng(0)
    tokens, length = rng.integers(3, 57, (rows, 10)), rng.integers(4, 11, rows)
    tokens[np.arange(10)[None] >= length[:, None]] = 1
    tokens[np.arange(rows), length - 1] = 59
    return tokens


def make_images(rows: int, height: int = 20, width: int = 20) -> np.ndarray:
    return np.random.default_rng(1).integers(0, 256, (rows, height, width, 3), np.uint8)


def normalised(images: np.ndarray) -> np.ndarray:
    return ((images / 255.0 - np.array(MEAN)) / np.array(STD)).astype(np.float32)


def to_torch(pixels: np.ndarray) -> torch.Tensor:
    return torch.tensor(rearrange(pixels, "b h w c -> b c h w"))


@torch.no_grad()
def towers_of(reference, pixels, tokens, mask) -> dict:
    """Returns the encoders' own outputs: CLIPModel replaces the pooled vectors by the projected ones."""
    mask = None if mask is None else torch.tensor(mask)
    return {
        "vision": reference.vision_model(to_torch(pixels), interpolate_pos_encoding=pixels.shape[1:3] != (20, 20)),
        "text": reference.text_model(torch.tensor(tokens), attention_mask=mask),
    }


@pytest.mark.parametrize("case", CASES)
def test_all_outputs_and_the_folder_written(case, load, assert_close, tmp_path):
    """Checks five texts against three images, of the native size and of one that is neither native nor square."""
    reference, module, params = load(case)
    tokens = texts(5)
    for size, mask in (((20, 20), (tokens != 1).astype(int)), ((30, 40), None)):
        pixels = normalised(make_images(3, *size))
        ours = jax.jit(module.apply)({"params": params}, pixels, tokens, mask)
        with torch.no_grad():
            theirs = reference(
                torch.tensor(tokens),
                to_torch(pixels),
                attention_mask=None if mask is None else torch.tensor(mask),
                interpolate_pos_encoding=size != (20, 20),
            )
        for name in ("image_embeds", "text_embeds", "logits_per_image", "logits_per_text"):
            assert_close(getattr(ours, name), getattr(theirs, name), 1e-4, f"{size}: {name}")
        for tower, their in towers_of(reference, pixels, tokens, mask).items():
            for name in ("last_hidden_state", "pooler_output"):
                assert_close(getattr(getattr(ours, tower), name), getattr(their, name), 1e-4, f"{size}: {tower} {name}")
    image = jax.jit(lambda p, x: module.apply({"params": p}, x, method="encode_image"))(params, pixels)
    text = jax.jit(lambda p, x: module.apply({"params": p}, x, method="encode_text"))(params, tokens)
    assert_close(image, theirs.image_embeds, 1e-4, "encode_image")
    assert_close(text, theirs.text_embeds, 1e-4, "encode_text")

    save_pretrained(module, params, tmp_path / "ours")
    opened, info = type(reference).from_pretrained(
        tmp_path / "ours", attn_implementation="eager", output_loading_info=True
    )
    assert not info["missing_keys"] and not info["unexpected_keys"]
    wanted = reference.state_dict()
    assert all(torch.equal(tensor, wanted[name]) for name, tensor in opened.state_dict().items())
    _, vision, text, options = CASES[case]
    for part, given in (("vision_config", vision), ("text_config", text)):
        assert {k: getattr(getattr(opened.config, part), k) for k in given} == given
    assert all(getattr(opened.config, name) == value for name, value in options.items())
    family = family_of_config(module.config)
    assert family.from_hf(family.to_hf(module.config)) == module.config


@pytest.mark.parametrize("case", CASES)
def test_loss_and_every_gradient(case, load, assert_close):
    """Compares the stage's own objective and batch with the loss that the reference class computes itself."""
    reference, module, params = load(case)
    config = module.config
    vision = {**vars(config.vision), "image_mean": MEAN, "image_std": STD}
    module = type(config)(**{**vars(config), "vision": type(config.vision)(**vision)}).make()
    tokens, images = texts(6), make_images(6)
    whole = np.ones_like(tokens)
    # SigLIP reads the last position, padding or not; CLIP's end of text precedes all padding.
    segments = whole if "siglip" in case else (tokens != 1).astype(int)
    batch = dict(
        tokens=tokens, positions=whole * np.arange(10), segments=segments, media_index=-whole, images=images[:, None]
    )
    theirs = reference(torch.tensor(tokens), to_torch(normalised(images)), return_loss=True).loss
    theirs.backward()

    def ours(p):
        def apply(p, b, method):
            return module.apply({"params": p}, b, method=method)

        return Contrastive(config.kind).loss(apply, p, {k: jnp.asarray(v) for k, v in batch.items()}, None)

    (value, metrics), grads = jax.jit(jax.value_and_grad(ours, has_aux=True))(params)
    assert float(metrics["weight"]) == 6
    assert_close(value, theirs.item(), 1e-4, "loss")
    mine = hub_tensors(family_of_config(config).table(config), grads)
    wanted = {name: p.grad.numpy() for name, p in reference.named_parameters()}
    assert set(mine) == set(wanted)
    for name, gradient in wanted.items():
        if name.endswith("k_proj.bias"):  # it cancels in the softmax
            assert np.abs(gradient).max() < 1e-6 and np.abs(mine[name]()).max() < 1e-6
        else:
            assert_close(mine[name](), gradient, 1e-3, name)


OPENAI_PART = dict(
    _name_or_path="", add_cross_attention=False, architectures=None, attention_dropout=0.0, bad_words_ids=None,
    bos_token_id=0, chunk_size_feed_forward=0, cross_attention_hidden_size=None, decoder_start_token_id=None,
    diversity_penalty=0.0, do_sample=False, dropout=0.0, early_stopping=False, encoder_no_repeat_ngram_size=0,
    eos_token_id=2, finetuning_task=None, forced_bos_token_id=None, forced_eos_token_id=None, hidden_act="quick_gelu",
    id2label={"0": "LABEL_0"}, initializer_factor=1.0, initializer_range=0.02, is_decoder=False,
    is_encoder_decoder=False, label2id={"LABEL_0": 0}, layer_norm_eps=1e-5, length_penalty=1.0, max_length=20,
    min_length=0, no_repeat_ngram_size=0, num_beam_groups=1, num_beams=1, num_return_sequences=1,
    output_attentions=False, output_hidden_states=False, output_scores=False, pad_token_id=1, prefix=None,
    problem_type=None, projection_dim=512, pruned_heads={}, remove_invalid_values=False, repetition_penalty=1.0,
    return_dict=True, return_dict_in_generate=False, sep_token_id=None, task_specific_params=None, temperature=1.0,
    tie_encoder_decoder=False, tie_word_embeddings=True, tokenizer_class=None, top_k=50, top_p=1.0, torch_dtype=None,
    torchscript=False, transformers_version="4.16.0.dev0", use_bfloat16=False,
)  # fmt: skip


def test_an_old_config_with_all_its_idle_options_and_doubled_parts():
    """Checks OpenAI's and LAION's first folders: `text_config_dict` has precedence over `text_config`."""
    old = OPENAI_PART | dict(hidden_size=64, intermediate_size=96, num_attention_heads=8, num_hidden_layers=12)
    values = dict(
        architectures=["CLIPModel"],
        _commit_hash=None,
        initializer_factor=1.0,
        logit_scale_init_value=2.6592,
        model_type="clip",
        projection_dim=512,
        text_config=old | dict(max_position_embeddings=77, vocab_size=49408, model_type="clip_text_model"),
        text_config_dict=dict(hidden_size=128, num_attention_heads=4, hidden_act="gelu"),
        torch_dtype="float32",
        transformers_version=None,
        vision_config=old | dict(image_size=224, patch_size=32, model_type="clip_vision_model"),
        vision_config_dict=None,
    )
    config = family_of(values).from_hf(values)
    theirs = transformers.CLIPConfig(**deepcopy(values))
    text, vision = theirs.text_config, theirs.vision_config
    ours = config.text
    assert (ours.hidden_size, ours.num_layers, ours.mlp_size) == (128, text.num_hidden_layers, text.intermediate_size)
    assert (text.hidden_size, text.hidden_act, ours.activation) == (128, "gelu", "gelu")
    assert (ours.eos_token_id, ours.dialect.pooling) == (text.eos_token_id, "eos")
    assert (config.vision.hidden_size, config.vision.mlp_size) == (vision.hidden_size, vision.intermediate_size)
    assert config.vision.activation == vision.hidden_act


def test_a_published_siglip_config():
    """Checks so400m/14-384, which has few options; the others are the class's defaults."""
    part = dict(hidden_size=1152, intermediate_size=4304, num_attention_heads=16, num_hidden_layers=27)
    values = dict(
        architectures=["SiglipModel"],
        initializer_factor=1.0,
        model_type="siglip",
        text_config=part | dict(model_type="siglip_text_model"),
        torch_dtype="float32",
        transformers_version="4.37.0.dev0",
        vision_config=part | dict(model_type="siglip_vision_model", image_size=384, patch_size=14),
    )
    config = family_of(values).from_hf(values)
    assert (config.text.vocab_size, config.text.max_length, config.text.dialect.head_size) == (32000, 64, 1152)
    assert (config.text.activation, config.vision.activation, config.vision.side) == ("gelu_tanh", "gelu_tanh", 27)
    sizes = jax.tree.leaves(
        jax.tree.map(
            lambda x: x.size, jax.eval_shape(config.make().init, jax.random.key(0), *family_of(values).sample(config))
        )
    )
    assert sum(sizes) == 877_960_498  # as published


@pytest.mark.parametrize("change", [dict(kind="sigmoid"), dict(pooling="patches"), dict(family="SiglipModel")])
def test_what_a_family_cannot_hold_is_not_written(change, load):
    _, module, _ = load("clip")
    config = type(module.config)(**{**vars(module.config), **change})
    with pytest.raises(ConfigError):
        family_of_config(config).to_hf(config)


@pytest.mark.parametrize(
    ("change", "shown"), [(dict(logit_bias=1.0), "logit_bias"), (dict(text_config=dict(rope_theta=1.0)), "rope_theta")]
)
def test_an_unknown_option_is_refused(change, shown, tmp_path):
    values = dict(architectures=["CLIPModel"], vision_config=VISION, text_config=TEXT) | change
    (tmp_path / "config.json").write_text(json.dumps(values))
    with pytest.raises(ConfigError, match=shown):
        from_pretrained(tmp_path)
