"""Qwen2.5-Omni's thinker against transformers: its audio tower, positions, logits, answers and folders."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from transformers import Qwen2_5OmniThinkerConfig
from transformers.models.qwen2_5_omni.configuration_qwen2_5_omni import Qwen2_5OmniAudioEncoderConfig
from transformers.models.qwen2_5_omni.modeling_qwen2_5_omni import (
    Qwen2_5OmniAudioEncoder,
    Qwen2_5OmniThinkerForConditionalGeneration,
)

from mllm_jax import from_pretrained, save_pretrained
from mllm_jax.errors import ConfigError, DataError
from mllm_jax.models.registry import abstract_params, family_of

AUDIO = dict(
    num_mel_bins=8,
    encoder_layers=2,
    encoder_attention_heads=2,
    encoder_ffn_dim=24,
    d_model=16,
    max_source_positions=9,
    n_window=4,
    output_dim=32,
)
TOWERS = {
    "even": AUDIO,
    # Averages span two chunks of 3 vectors each.
    "odd": AUDIO | dict(n_window=3, num_mel_bins=5, encoder_attention_heads=4, output_dim=20),
    "wide": AUDIO | dict(n_window=9, encoder_layers=1, d_model=18, encoder_attention_heads=3, activation_function="relu"),
}
LENGTHS = (33, 1, 2, 3, 24, 7, 16)  # mel frames


@pytest.mark.parametrize("name", TOWERS)
def test_the_audio_tower(name, tmp_path, randomise, assert_close):
    reference = randomise(Qwen2_5OmniAudioEncoder(Qwen2_5OmniAudioEncoderConfig(**TOWERS[name])))
    reference.save_pretrained(tmp_path)
    module, params = from_pretrained(tmp_path)
    mel = TOWERS[name]["num_mel_bins"]
    features = np.random.default_rng(0).normal(size=(len(LENGTHS), mel, max(LENGTHS))).astype(np.float32)
    mask = np.arange(max(LENGTHS)) < np.asarray(LENGTHS)[:, None]
    flat = torch.tensor(features.transpose(0, 2, 1)[mask].T)
    with torch.no_grad():
        wanted = reference(flat, feature_lens=torch.tensor(LENGTHS), output_hidden_states=True)
    out = jax.jit(lambda f, m: module.apply({"params": params}, f, m, output_hidden_states=True))(features, mask)
    counts = [module.config.frames(n) for n in LENGTHS]
    assert counts == module.config.frames(np.asarray(LENGTHS)).tolist() == np.asarray(out.mask).sum(1).tolist()
    assert_close(np.asarray(out.last_hidden_state)[np.asarray(out.mask)], wanted.last_hidden_state, 1e-5, name)
    vectors = -(-np.asarray(LENGTHS) // 2)
    for ours, theirs in zip(out.hidden_states, wanted.hidden_states, strict=True):
        valid = np.arange(ours.shape[1]) < vectors[:, None]
        assert_close(np.asarray(ours)[valid], theirs, 1e-5, f"{name}: hidden states")
    # Each sound alone, without padding or a mask; and in pieces, as a batch of a language model has it.
    piece = module.config.piece
    for row, (length, count) in enumerate(zip(LENGTHS, counts, strict=True)):
        if count:
            alone = module.apply({"params": params}, features[row : row + 1, :, :length]).last_hidden_state[0]
            assert_close(alone, out.last_hidden_state[row, :count], 1e-5, f"{length} frames alone")
    pieces = np.zeros((-(-33 // piece), mel, piece), np.float32)
    for number in range(len(pieces)):
        cut = features[0, :, number * piece : (number + 1) * piece]
        pieces[number, :, : cut.shape[1]] = cut
    valid = np.arange(pieces.size // mel).reshape(len(pieces), piece) < 33
    joined = module.apply({"params": params}, pieces, valid)
    assert_close(joined.last_hidden_state[joined.mask], out.last_hidden_state[0], 1e-5, "in pieces")

    save_pretrained(module, params, tmp_path / "ours")
    opened, report = Qwen2_5OmniAudioEncoder.from_pretrained(tmp_path / "ours", output_loading_info=True)
    assert not any(report[what] for what in ("missing_keys", "unexpected_keys", "mismatched_keys")), report
    kept = reference.state_dict()
    assert all(torch.equal(tensor, kept[name]) for name, tensor in opened.state_dict().items())


def test_the_audio_tower_refuses_features_of_another_shape(tmp_path, randomise):
    randomise(Qwen2_5OmniAudioEncoder(Qwen2_5OmniAudioEncoderConfig(**AUDIO))).save_pretrained(tmp_path)
    module, params = from_pretrained(tmp_path)
    with pytest.raises(DataError, match=r"features of shape \(1, 7, 16\)"):
        module.apply({"params": params}, jnp.zeros((1, 7, 16)))
