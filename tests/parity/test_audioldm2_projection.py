"""AudioLDM-2's projection model against diffusers, through real folders both ways."""

from __future__ import annotations

import jax
import numpy as np
import pytest
import torch
from diffusers import AudioLDM2ProjectionModel
from flax import linen as nn

from mllm_jax import from_pretrained, save_pretrained
from mllm_jax.checkpoints.hf import hub_tensors
from mllm_jax.errors import ConfigError, DataError
from mllm_jax.generators.audioldm2_projection import FAMILIES, AudioLDM2ProjectionConfig, from_hf_config
from mllm_jax.models.registry import abstract_params

SIZES = dict(text_encoder_dim=6, text_encoder_1_dim=10, langauge_model_dim=8)
CASES = {"plain": SIZES, "positions": SIZES | dict(use_learned_position_embedding=True, max_seq_length=5)}


def texts() -> tuple[np.ndarray, ...]:
    rng = np.random.default_rng(0)
    clap, t5 = (rng.normal(size=shape).astype(np.float32) for shape in ((3, 1, 6), (3, 5, 10)))
    return clap, t5, np.ones((3, 1), int), (np.arange(5)[None] < np.array([[5], [2], [1]])).astype(int)


@pytest.mark.parametrize("case", CASES)
def test_states_masks_gradients_and_folders_both_ways(case, randomise, assert_close, tmp_path):
    reference = randomise(AudioLDM2ProjectionModel(**CASES[case]))
    reference.save_pretrained(tmp_path / "theirs")
    module, params = from_pretrained(tmp_path / "theirs")
    inputs = texts()
    apply = jax.jit(lambda p, *inputs: module.apply({"params": p}, *inputs))
    states, mask = apply(params, *inputs)
    theirs = reference(*map(torch.tensor, inputs))
    assert states.shape == (3, 10, 8)
    assert_close(states, theirs.hidden_states.detach(), 1e-6, "states")
    assert mask.tolist() == theirs.attention_mask.tolist()
    unmasked, none = apply(params, *inputs[:2])
    assert none is None and np.array_equal(unmasked, states)
    # With one mask the reference fails; the other text counts whole.
    for given, shown in ((dict(t5_mask=inputs[3]), mask), (dict(clap_mask=inputs[2]), np.ones((3, 10)))):
        assert module.apply({"params": params}, *inputs[:2], **given)[1].tolist() == np.asarray(shown).tolist()

    theirs.hidden_states.square().sum().backward()
    gradients = jax.jit(jax.grad(lambda p: (apply(p, *inputs)[0] ** 2).sum()))(params)
    ours = {name: tensor() for name, tensor in hub_tensors(FAMILIES[0].table(module.config), gradients).items()}
    found = dict(reference.named_parameters())
    assert ours.keys() == found.keys()
    for name, tensor in ours.items():
        assert_close(tensor, found[name].grad, 1e-5, name)

    save_pretrained(module, params, tmp_path / "ours")
    again, info = AudioLDM2ProjectionModel.from_pretrained(tmp_path / "ours", output_loading_info=True)
    assert not any(info[what] for what in ("missing_keys", "unexpected_keys", "mismatched_keys")), info
    assert {name: again.config[name] for name in CASES[case]} == CASES[case]
    kept = reference.state_dict()
    assert all(torch.equal(tensor, kept[name]) for name, tensor in again.state_dict().items())
    assert from_pretrained(tmp_path / "ours")[0].config == module.config


def test_the_full_size():
    options = dict(text_encoder_dim=512, text_encoder_1_dim=1024, langauge_model_dim=768)
    config = from_hf_config(options | dict(_class_name="AudioLDM2ProjectionModel"))
    assert config == AudioLDM2ProjectionConfig()
    with torch.device("meta"):
        reference = AudioLDM2ProjectionModel(**options)
    abstract = nn.meta.unbox(abstract_params(config, FAMILIES[0]))
    count = sum(leaf.size for leaf in jax.tree.leaves(abstract))
    assert count == sum(p.numel() for p in reference.parameters()) == 1_184_256


@pytest.mark.parametrize(
    "option,message",
    [
        (dict(use_learned_position_embedding=True), "max_seq_length"),
        (dict(use_learned_position_embedding=False), "use_learned_position_embedding=False"),
        (dict(text_encoder_dim=None), "text_encoder_dim"),
        (dict(dropout_scale=0.1), "dropout_scale=0.1"),
    ],
)
def test_options_that_are_refused_by_name(option, message):
    with pytest.raises(ConfigError, match=message):
        from_hf_config(SIZES | option)


@pytest.mark.parametrize(
    "change,message",
    [
        (dict(clap=np.zeros((3, 6), np.float32)), r"a text of shape \[3, 6\]"),
        (dict(t5=np.zeros((3, 4, 10), np.float32)), "5 vectors"),
        (dict(t5_mask=np.ones((3, 4), int)), r"a mask \[3, 4\]"),
    ],
)
def test_texts_of_other_shapes_are_refused(change, message):
    given = dict(zip(("clap", "t5", "clap_mask", "t5_mask"), texts(), strict=True)) | change
    module = from_hf_config(CASES["positions"]).make()
    with pytest.raises(DataError, match=message):
        jax.eval_shape(module.init, jax.random.key(0), **given)
