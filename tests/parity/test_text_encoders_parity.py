"""CLIP's and SigLIP's text encoders against transformers, through real folders both ways."""

from __future__ import annotations

import json

import jax
import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from toy_data import quick_compilation

from mllm_jax.checkpoints.fields import change_fields
from mllm_jax.errors import ConfigError
from mllm_jax.models.registry import family_of_config, from_pretrained, save_pretrained

CLIP = dict(
    vocab_size=61,
    hidden_size=24,
    intermediate_size=40,
    num_hidden_layers=3,
    num_attention_heads=3,
    max_position_embeddings=12,
    layer_norm_eps=1e-2,  # large, so that a wrong epsilon shows
    bos_token_id=58,
    eos_token_id=59,
    pad_token_id=1,
)
SIGLIP = CLIP | dict(hidden_size=32, num_attention_heads=2)
CASES = {
    "clip": ("CLIPTextModel", CLIP),
    "clip old end of text": ("CLIPTextModel", CLIP | dict(eos_token_id=2, hidden_act="gelu")),
    "clip one layer": (
        "CLIPTextModel",
        CLIP | dict(num_hidden_layers=1, num_attention_heads=1, hidden_act="gelu_pytorch_tanh"),
    ),
    "clip projected": ("CLIPTextModelWithProjection", CLIP | dict(projection_dim=10)),
    "clip projected, old": ("CLIPTextModelWithProjection", CLIP | dict(projection_dim=40, eos_token_id=2)),
    "clip projected, gelu": ("CLIPTextModelWithProjection", CLIP | dict(projection_dim=24, hidden_act="gelu")),
    "siglip": ("SiglipTextModel", SIGLIP),
    "siglip projected": ("SiglipTextModel", SIGLIP | dict(projection_size=10, num_hidden_layers=2)),
    "siglip quick": ("SiglipTextModel", SIGLIP | dict(hidden_act="quick_gelu", num_attention_heads=4)),
}


def texts(end: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns ids and mask: a full row, rows padded with an unused id or with the end, and a row with two ends."""
    rng = np.random.default_rng(0)
    tokens, lengths = rng.integers(3, 57, (4, 12)), (12, 7, 4, 9)
    mask = np.arange(12)[None] < np.array(lengths)[:, None]
    tokens = np.where(mask, tokens, np.array([1, 1, 60, 1])[:, None])
    tokens[2, 4:] = end  # as OpenAI's tokenizer pads
    for row, n in enumerate(lengths):
        tokens[row, n - 1] = end
    tokens[3, 5] = end  # the first counts
    return tokens, mask.astype(int)


@pytest.fixture(autouse=True)
def _quickly():
    with quick_compilation():
        yield


@pytest.fixture
def load(randomise, tmp_path):
    def make(case: str):
        name, options = CASES[case]
        config = getattr(transformers, name.split("Model")[0] + "Config")(**options)
        reference = randomise(getattr(transformers, name)._from_config(config, attn_implementation="eager"))
        reference.save_pretrained(tmp_path / "theirs")
        return reference, *from_pretrained(tmp_path / "theirs")

    return make


def outputs(reference, tokens, mask=None) -> dict[str, np.ndarray]:
    with torch.no_grad():
        mask = None if mask is None else torch.tensor(mask)
        out = reference(torch.tensor(tokens), attention_mask=mask, output_hidden_states=True)
    states = {f"hidden {i}": x for i, x in enumerate(out.hidden_states)}
    names = [n for n in ("last_hidden_state", "pooler_output", "text_embeds") if getattr(out, n, None) is not None]
    return {name: x.numpy() for name, x in (states | {n: getattr(out, n) for n in names}).items()}


@pytest.mark.parametrize("case", CASES)
def test_all_outputs_and_the_folder_written(case, load, assert_close, tmp_path):
    reference, module, params = load(case)
    tokens, mask = texts(59)
    apply = jax.jit(module.apply, static_argnames="output_hidden_states")
    for name, given in (("without a mask", None), ("with a mask", mask)):
        out = apply({"params": params}, tokens, given, output_hidden_states=True)
        ours = {f"hidden {i}": x for i, x in enumerate(out.hidden_states)}
        ours |= {n: getattr(out, n) for n in ("last_hidden_state", "pooler_output", "text_embeds")}
        theirs = outputs(reference, tokens, given)
        assert len(theirs) == 3 + module.config.num_layers
        for key, value in theirs.items():
            assert_close(ours[key], value, 1e-4, f"{name}: {key}")
    assert out.hidden_states is not None and apply({"params": params}, tokens).hidden_states is None
    short = jax.jit(module.apply)({"params": params}, tokens[:, :7])
    key = "text_embeds" if "projected" in case and "siglip" not in case else "pooler_output"
    assert_close(getattr(short, key), outputs(reference, tokens[:, :7])[key], 1e-4, "a shorter row")

    save_pretrained(module, params, tmp_path / "ours")
    stored = load_file(tmp_path / "ours" / "model.safetensors")
    assert all(name.startswith(("text_model.", "text_projection.")) for name in stored), "the hub's names"
    opened, info = type(reference).from_pretrained(
        tmp_path / "ours", attn_implementation="eager", output_loading_info=True
    )
    assert not info["missing_keys"] and not info["unexpected_keys"]
    theirs = reference.state_dict()
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in opened.state_dict().items())
    for name, value in CASES[case][1].items():
        assert getattr(opened.config, name) == value, name
    family = family_of_config(module.config)
    assert family.from_hf(family.to_hf(module.config)) == module.config


@pytest.mark.parametrize("case", ["clip", "siglip"])
def test_the_hubs_spelling_and_an_old_folder(case, load, tmp_path):
    _, module, params = load(case)
    folder = tmp_path / "theirs"
    tensors = load_file(folder / "model.safetensors")
    tensors = {f"text_model.{name.removeprefix('text_model.')}": tensor for name, tensor in tensors.items()}
    tensors["text_model.embeddings.position_ids"] = torch.arange(12)[None].float()
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    _, again = from_pretrained(folder)
    assert all(np.array_equal(a, b) for a, b in zip(jax.tree.leaves(params), jax.tree.leaves(again), strict=True))


@pytest.mark.parametrize("case", ["clip", "clip old end of text", "siglip projected"])
def test_texts_packed_into_a_row(case, load, assert_close):
    """Checks the encoder in the contrastive stage: each text of a row gives the same as alone."""
    _, module, params = load(case)
    rng = np.random.default_rng(1)
    alone = [np.append(rng.integers(3, 57, n), 59) for n in (3, 5)]
    tokens, segments = np.array([[*alone[0], *alone[1], 1, 1]]), np.array([[1] * 4 + [2] * 6 + [0] * 2])
    positions = np.array([[*range(4), *range(6), 0, 0]])
    packed = module.apply({"params": params}, tokens, positions, segments, 3, method="embed")
    assert packed.shape == (1, 3, module.config.output_size)
    for number, text in enumerate(alone):
        wanted = module.apply({"params": params}, text[None]).pooler_output
        assert_close(packed[:, number], wanted, 1e-5, f"text {number}")


REFUSED = {
    "a list of ends": (dict(eos_token_id=[58, 59]), "eos_token_id"),
    "an activation": (dict(hidden_act="mish"), "mish"),
    "an unknown option": (dict(rope_theta=3.0), "rope_theta"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_options_that_are_refused(name, tmp_path):
    options, shown = REFUSED[name]
    (tmp_path / "config.json").write_text(json.dumps(CLIP | options | dict(architectures=["CLIPTextModel"])))
    with pytest.raises(ConfigError, match=shown):
        from_pretrained(tmp_path)


def test_a_text_that_is_too_long_is_refused(load):
    _, module, params = load("clip")
    with pytest.raises(ConfigError, match="13 tokens"):
        module.apply({"params": params}, np.ones((1, 13), int))


def test_an_encoder_of_our_own_is_not_written_as_clip(load):
    _, module, _ = load("clip")
    family = family_of_config(module.config)
    with pytest.raises(ConfigError, match="pooling='mean'"):
        family.to_hf(change_fields(module.config, pooling="mean"))
