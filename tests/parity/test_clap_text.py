"""CLAP's text encoder against transformers, through real folders both ways."""

from __future__ import annotations

import jax
import numpy as np
import pytest
import torch
import transformers
from flax import linen as nn
from safetensors.torch import load_file
from toy_data import quick_compilation

from mllm_jax import from_pretrained, save_pretrained
from mllm_jax.checkpoints.hf import hub_tensors
from mllm_jax.encoders.clap_text import FAMILIES, ClapTextConfig, from_hf_config, to_hf_config
from mllm_jax.errors import ConfigError
from mllm_jax.models.registry import abstract_params

SIZES = dict(
    vocab_size=61,
    hidden_size=24,
    intermediate_size=40,
    num_hidden_layers=3,
    num_attention_heads=3,
    max_position_embeddings=16,
    layer_norm_eps=1e-2,  # large, so that a wrong epsilon shows
    projection_dim=10,
)
CASES = {
    "relu": dict(SIZES),
    "wide projection, another padding, types": SIZES
    | dict(projection_dim=40, pad_token_id=3, type_vocab_size=2, hidden_act="relu", projection_hidden_act="gelu"),
    "one layer": SIZES
    | dict(num_hidden_layers=1, num_attention_heads=1, hidden_act="gelu_pytorch_tanh", pad_token_id=0),
}
LENGTHS = (12, 7, 4, 1)


@pytest.fixture(autouse=True)
def _quickly():
    with quick_compilation():
        yield


@pytest.fixture
def load(randomise, tmp_path):
    def make(case: str):
        reference = randomise(transformers.ClapTextModelWithProjection(transformers.ClapTextConfig(**CASES[case])))
        reference.set_attn_implementation("eager")
        reference.save_pretrained(tmp_path / "theirs")
        return reference, *from_pretrained(tmp_path / "theirs")

    return make


def texts(pad: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns ids and mask of rows of unequal length, one of them with padding inside the text."""
    rng = np.random.default_rng(0)
    tokens = rng.integers(5, SIZES["vocab_size"], (len(LENGTHS), max(LENGTHS)))
    mask = np.arange(max(LENGTHS))[None] < np.array(LENGTHS)[:, None]
    tokens = np.where(mask, tokens, pad)
    tokens[0, 5] = pad
    return tokens, mask.astype(int)


def outputs(reference, tokens, mask=None) -> dict[str, np.ndarray]:
    with torch.no_grad():
        mask = None if mask is None else torch.tensor(mask)
        out = reference(torch.tensor(tokens), attention_mask=mask, output_hidden_states=True)
        inner = reference.text_model(torch.tensor(tokens), attention_mask=mask)
    states = {f"hidden {i}": x for i, x in enumerate(out.hidden_states)}
    found = dict(last_hidden_state=out.last_hidden_state, text_embeds=out.text_embeds, pooler_output=inner[1])
    return {name: x.numpy() for name, x in (states | found).items()}


@pytest.mark.parametrize("case", CASES)
def test_all_outputs_and_the_folder_written(case, load, assert_close, tmp_path):
    reference, module, params = load(case)
    tokens, mask = texts(module.config.pad_token_id)
    apply = jax.jit(module.apply, static_argnames="output_hidden_states")
    for name, given in (("without a mask", None), ("with a mask", mask)):
        out = apply({"params": params}, tokens, given, output_hidden_states=True)
        ours = {f"hidden {i}": x for i, x in enumerate(out.hidden_states)}
        ours |= {n: getattr(out, n) for n in ("last_hidden_state", "pooler_output", "text_embeds")}
        theirs = outputs(reference, tokens, given)
        assert len(theirs) == 4 + module.config.num_layers
        for key, value in theirs.items():
            assert_close(ours[key], value, 1e-5, f"{name}: {key}")
    alone = apply({"params": params}, tokens[2:3, : LENGTHS[2]])
    assert alone.hidden_states is None
    assert_close(out.text_embeds[2:3], alone.text_embeds, 1e-5, "padding changes nothing")

    save_pretrained(module, params, tmp_path / "ours")
    opened, info = transformers.ClapTextModelWithProjection.from_pretrained(
        tmp_path / "ours", attn_implementation="eager", output_loading_info=True
    )
    # The buffers, which are counted from 0, have no parameters here.
    buffers = {name for name, _ in reference.named_buffers()}
    assert not info["missing_keys"] - buffers and not info["unexpected_keys"] and not info["mismatched_keys"]
    theirs = reference.state_dict()
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in opened.state_dict().items())
    for name, value in outputs(opened, tokens, mask).items():
        assert_close(value, outputs(reference, tokens, mask)[name], 1e-6, f"the folder written here: {name}")
    for name, value in CASES[case].items():
        assert getattr(opened.config, name) == value, name
    stored = load_file(tmp_path / "theirs" / "model.safetensors").keys()
    assert stored - buffers == load_file(tmp_path / "ours" / "model.safetensors").keys()
    assert from_hf_config(to_hf_config(module.config)) == module.config


def test_the_text_part_of_a_whole_clap(randomise, assert_close, tmp_path):
    audio = dict(spec_size=16, num_mel_bins=4, patch_size=2, patch_stride=[2, 2], patch_embeds_hidden_size=8)
    audio |= dict(hidden_size=16, depths=[1, 1], num_attention_heads=[1, 2], window_size=2, num_classes=3)
    config = transformers.ClapConfig(
        text_config=SIZES, audio_config=audio, projection_dim=7, projection_hidden_act="gelu"
    )
    reference = randomise_whole(transformers.ClapModel(config), randomise)
    reference.save_pretrained(tmp_path)
    module, params = from_pretrained(tmp_path)
    assert (module.config.projection_size, module.config.projection_activation) == (7, "gelu")
    tokens, mask = texts(1)
    ours = module.apply({"params": params}, tokens, mask)
    with torch.no_grad():
        theirs = reference.text_model(torch.tensor(tokens), attention_mask=torch.tensor(mask))
        wanted = reference.text_projection(theirs.pooler_output)
    assert_close(ours.last_hidden_state, theirs.last_hidden_state, 1e-5)
    assert_close(ours.text_embeds, wanted, 1e-5)


def randomise_whole(reference, randomise):
    """Fills the text part; the audio part keeps what its class draws."""
    randomise(reference.text_model), randomise(reference.text_projection)
    return reference.eval()


def test_gradients(load, assert_close):
    reference, module, params = load("relu")
    tokens, mask = texts(1)
    reference(torch.tensor(tokens), attention_mask=torch.tensor(mask)).text_embeds.square().sum().backward()
    gradients = jax.jit(jax.grad(lambda p: (module.apply({"params": p}, tokens, mask).text_embeds ** 2).sum()))(params)
    ours = {name: tensor() for name, tensor in hub_tensors(FAMILIES[0].table(module.config), gradients).items()}
    found = dict(reference.named_parameters())
    assert ours.keys() == found.keys()
    for name, tensor in ours.items():
        if ".key.bias" in name:
            continue  # it cancels in the softmax
        theirs = found[name].grad.numpy()
        if "word" in name or "position" in name:
            # The reference does not train the rows of padding.
            tensor, theirs = np.delete(tensor, 1, axis=0), np.delete(theirs, 1, axis=0)
        assert_close(tensor, theirs, 1e-3, name)


def test_the_full_size():
    config = from_hf_config(dict(architectures=["ClapTextModelWithProjection"], model_type="clap_text_model"))
    assert config == ClapTextConfig()
    with torch.device("meta"):
        reference = transformers.ClapTextModelWithProjection(transformers.ClapTextConfig())
    abstract = nn.meta.unbox(abstract_params(config, FAMILIES[0]))
    count = sum(leaf.size for leaf in jax.tree.leaves(abstract))
    assert count == sum(p.numel() for p in reference.parameters()) == 125_302_016


@pytest.mark.parametrize(
    "option,message",
    [
        (dict(position_embedding_type="relative_key"), "position_embedding_type='relative_key'"),
        (dict(projection_hidden_act="mish"), "projection_hidden_act='mish'"),
        (dict(num_attention_heads=5), "5 heads"),
        (dict(pad_token_id=15), "pad_token_id 15"),
        (dict(max_position_embeddings=512, pad_token_id=61), "pad_token_id 61 of 61 tokens"),
        (dict(pad_token_id=-1), "pad_token_id=-1"),
        (dict(rope_theta=3.0), "rope_theta=3.0"),
        (dict(architectures=["ClapModel"]), "ClapModel"),
    ],
)
def test_options_that_are_refused_by_name(option, message):
    with pytest.raises(ConfigError, match=message):
        from_hf_config(SIZES | dict(architectures=["ClapTextModelWithProjection"]) | option)


def test_a_text_that_is_too_long_is_refused(load):
    _, module, params = load("relu")
    assert module.config.max_length == 14
    with pytest.raises(ConfigError, match="15 tokens"):
        module.apply({"params": params}, np.ones((1, 15), int))
