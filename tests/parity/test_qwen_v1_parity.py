"""The first Qwen against Qwen2's class with renamed weights, which is equal up to the trained length."""

from __future__ import annotations

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from qwen_vl_v1_reference import renamed
from safetensors.numpy import load_file, save_file
from tiny_language import answers, language
from transformers import Qwen2Config, Qwen2ForCausalLM

from mllm_jax import from_pretrained, save_pretrained
from mllm_jax.errors import ConfigError
from mllm_jax.generation.options import Options
from mllm_jax.llms.qwen_v1 import from_hf_config, to_hf_config
from mllm_jax.models.registry import abstract_params, family_of_config

LENGTH, VOCAB, WIDTH, MLP, LAYERS = 40, 61, 32, 48, 2
CONFIG = dict(architectures=["QWenLMHeadModel"], model_type="qwen", vocab_size=VOCAB, hidden_size=WIDTH)
CONFIG |= dict(num_hidden_layers=LAYERS, num_attention_heads=4, kv_channels=8, intermediate_size=2 * MLP)
CONFIG |= dict(layer_norm_epsilon=1e-6, rotary_emb_base=10000, rotary_pct=1.0, no_bias=True, seq_length=LENGTH)
CONFIG |= dict(use_dynamic_ntk=True, use_logn_attn=True, tie_word_embeddings=False, max_position_embeddings=99)


@pytest.fixture(scope="module", params=[0, 1, 2])
def loaded(request, tmp_path_factory, randomise, to_numpy):
    sizes = dict(vocab_size=VOCAB, hidden_size=WIDTH, intermediate_size=MLP, num_hidden_layers=LAYERS)
    sizes |= dict(num_attention_heads=4, num_key_value_heads=4, rope_theta=10000.0, rms_norm_eps=1e-6)
    reference = randomise(Qwen2ForCausalLM(Qwen2Config(**sizes, tie_word_embeddings=False)), request.param)
    folder = tmp_path_factory.mktemp("qwen")
    (folder / "config.json").write_text(json.dumps(CONFIG))
    save_file(renamed(to_numpy(reference.state_dict())), folder / "model.safetensors")
    return reference, folder, *from_pretrained(folder)


def test_logits_greedy_tokens_and_the_written_folder(loaded, assert_close):
    reference, folder, module, params = loaded
    tokens = np.random.default_rng(0).integers(1, VOCAB, (2, LENGTH))
    segments = np.ones((2, LENGTH), np.int32)
    segments[1, 25:] = 0  # a shorter text beside a longer one
    apply = jax.jit(lambda tokens, segments: module.apply({"params": params}, tokens, None, segments))
    ours = np.asarray(apply(tokens, segments))
    for row, length in ((0, LENGTH), (1, 25)):
        with torch.no_grad():
            theirs = reference(torch.tensor(tokens[row : row + 1, :length])).logits[0]
        assert_close(ours[row, :length], theirs, 1e-4, f"row {row}")

    said = reference.generate(
        torch.tensor(tokens[:1, :8]),
        max_new_tokens=32,
        min_new_tokens=32,
        do_sample=False,
        eos_token_id=None,
        pad_token_id=0,
    )
    options = Options(max_new_tokens=32, ignore_eos=True)
    found = answers(language(module, params), [tokens[0, :8].tolist(), tokens[1, :3].tolist()], options)
    assert list(found[0].tokens) == said[0, 8:].tolist()

    save_pretrained(module, params, folder / "ours")
    kept, written = load_file(folder / "model.safetensors"), load_file(folder / "ours" / "model.safetensors")
    assert kept.keys() == written.keys()
    for name, array in kept.items():
        np.testing.assert_array_equal(written[name], array, err_msg=name)


def test_longer_texts_are_refused_or_nan():
    config = from_hf_config(CONFIG)
    module, tokens = config.make(), jnp.zeros((1, LENGTH + 1), jnp.int32)
    with pytest.raises(ConfigError, match=rf"max_length {LENGTH + 1} [\s\S]* at most {LENGTH}"):
        language(module, {}, max_length=LENGTH + 1)
    with pytest.raises(ConfigError, match=f"{LENGTH + 1} tokens"):
        jax.eval_shape(module.init, jax.random.key(0), tokens)
    places = jnp.array([[0, 1, LENGTH - 1], [0, 1, LENGTH]])
    logits = module.init_with_output(jax.random.key(0), tokens[:, :3].repeat(2, axis=0), places)[0]
    assert jnp.isfinite(logits[0]).all() and jnp.isnan(logits[1, 2]).all()
    plain = from_hf_config(CONFIG | dict(use_dynamic_ntk=False, use_logn_attn=False))
    assert plain.dialect.longest is None and from_hf_config(to_hf_config(plain)) == plain
    jax.eval_shape(plain.make().init, jax.random.key(0), tokens)


@pytest.mark.parametrize(
    "wrong",
    [dict(rotary_pct=0.5), dict(visual=dict(width=4)), dict(no_bias=False), dict(use_logn_attn=False), dict(odd=1)],
)
def test_options_that_are_not_supported_are_refused_by_name(wrong):
    with pytest.raises(ConfigError, match=next(iter(wrong))):
        from_hf_config(CONFIG | wrong)


def test_the_published_size():
    """Checks Qwen-7B, which Qwen-VL uses too: 7.7 billion in table 1 of arXiv 2308.12966."""
    full = dict(vocab_size=151936, hidden_size=4096, num_hidden_layers=32, num_attention_heads=32, kv_channels=128)
    config = from_hf_config(CONFIG | full | dict(intermediate_size=22016, seq_length=8192))
    leaves = jax.tree.leaves(abstract_params(config, family_of_config(config)))
    assert sum(leaf.size for leaf in leaves) == 7_721_324_544
