"""T5's encoder alone against transformers, through real folders both ways."""

from __future__ import annotations

import jax
import numpy as np
import pytest
import torch
import transformers
from flax import linen as nn

from mllm_jax import from_pretrained, save_pretrained
from mllm_jax.errors import ConfigError
from mllm_jax.llms.t5_encoder import FAMILIES, from_hf_config, to_hf_config
from mllm_jax.models.registry import abstract_params

SIZES = dict(vocab_size=61, d_model=24, d_kv=10, d_ff=40, num_layers=3, num_heads=4, relative_attention_num_buckets=8)
CASES = {
    "1.0": SIZES | dict(relative_attention_max_distance=6, layer_norm_epsilon=1e-2),
    "flan": SIZES | dict(feed_forward_proj="gated-gelu", tie_word_embeddings=False, num_decoder_layers=2),
}
LENGTHS = (12, 7, 1)


@pytest.mark.parametrize("case", CASES)
def test_states_and_folders_both_ways(case, randomise, assert_close, tmp_path):
    reference = randomise(transformers.T5EncoderModel(transformers.T5Config(**CASES[case])))
    reference.save_pretrained(tmp_path / "theirs")
    module, params = from_pretrained(tmp_path / "theirs")
    tokens = np.random.default_rng(0).integers(3, 61, (3, 12))
    mask = (np.arange(12)[None] < np.array(LENGTHS)[:, None]).astype(int)
    apply = jax.jit(module.apply)

    def states(model, given=None):
        with torch.no_grad():
            given = None if given is None else torch.tensor(given)
            return model(torch.tensor(tokens), attention_mask=given).last_hidden_state.numpy()

    assert_close(apply({"params": params}, tokens).last_hidden_state, states(reference), 1e-5, "without a mask")
    ours = apply({"params": params}, tokens, mask).last_hidden_state
    for row, n in enumerate(LENGTHS):
        assert_close(ours[row, :n], states(reference, mask)[row, :n], 1e-5, f"row {row}")

    save_pretrained(module, params, tmp_path / "ours")
    opened, info = transformers.T5EncoderModel.from_pretrained(tmp_path / "ours", output_loading_info=True)
    assert not any(info[what] for what in ("missing_keys", "unexpected_keys", "mismatched_keys")), info
    np.testing.assert_array_equal(states(opened, mask), states(reference, mask))
    for name, value in CASES[case].items():
        assert name == "tie_word_embeddings" or getattr(opened.config, name) == value, name
    assert from_hf_config(to_hf_config(module.config)) == module.config


def test_the_encoder_of_a_whole_model(randomise, assert_close, tmp_path):
    """Checks a folder whose class is the encoder, and whose weights are those of the whole model."""
    whole = randomise(transformers.T5ForConditionalGeneration(transformers.T5Config(**CASES["1.0"])))
    whole.save_pretrained(tmp_path)
    config = tmp_path / "config.json"
    config.write_text(config.read_text().replace("T5ForConditionalGeneration", "T5EncoderModel"))
    module, params = from_pretrained(tmp_path)
    tokens = np.arange(3, 10)[None]
    with torch.no_grad():
        wanted = whole.encoder(torch.tensor(tokens)).last_hidden_state.numpy()
    assert_close(module.apply({"params": params}, tokens).last_hidden_state, wanted, 1e-5)


def test_the_full_size_of_flan_t5_large():
    options = dict(d_model=1024, d_ff=2816, num_layers=24, num_heads=16, feed_forward_proj="gated-gelu")
    with torch.device("meta"):
        reference = transformers.T5EncoderModel(transformers.T5Config(**options))
    abstract = nn.meta.unbox(abstract_params(from_hf_config(options), FAMILIES[0]))
    count = sum(leaf.size for leaf in jax.tree.leaves(abstract))
    assert count == sum(p.numel() for p in reference.parameters()) == 341_231_104


def test_an_unknown_option_is_refused_by_name():
    with pytest.raises(ConfigError, match="is_decoder=True"):
        from_hf_config(SIZES | dict(is_decoder=True))
