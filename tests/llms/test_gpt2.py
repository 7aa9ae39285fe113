"""GPT-2: config.json read and written, its two classes, hidden states, older folders, and its full size."""

from __future__ import annotations

import jax
import numpy as np
import pytest
import torch
import transformers
from flax import linen as nn
from safetensors.torch import load_file, save_file

from mllm_jax import from_pretrained, save_pretrained
from mllm_jax.checkpoints.fields import change_fields
from mllm_jax.errors import ConfigError
from mllm_jax.llms.gpt2 import FAMILIES, MODEL, WITH_HEAD, from_hf_config, to_hf_config
from mllm_jax.models.registry import abstract_params

SIZES = dict(vocab_size=61, n_embd=24, n_layer=3, n_head=4, n_positions=20, n_inner=40, layer_norm_epsilon=1e-2)


def read(family: str = WITH_HEAD, **options):
    return from_hf_config(dict(architectures=[family], model_type="gpt2") | options)


@pytest.fixture
def reference():
    """Returns GPT2Model with random weights."""
    torch.manual_seed(0)
    model = transformers.GPT2Model(transformers.GPT2Config(**SIZES)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape) * (0.5 if parameter.ndim == 1 else 0.3))
    return model


@torch.no_grad()
def states_of(model, **inputs) -> np.ndarray:
    return model(**inputs).last_hidden_state.numpy()


@pytest.mark.parametrize("family", [WITH_HEAD, MODEL])
def test_defaults_are_those_of_the_reference_and_writing_is_the_inverse(family):
    written = transformers.GPT2Config().to_dict()
    assert read(family) == read(family, **{k: v for k, v in written.items() if k != "architectures"})
    config = read(family, **SIZES, eos_token_id=[4, 5], bos_token_id=None, pad_token_id=6, activation_function="relu")
    assert from_hf_config(to_hf_config(config)) == config and to_hf_config(config)["n_inner"] == 40
    assert read(family, n_inner=None).mlp_size == 4 * 768


def test_hidden_states_of_embeddings_of_unequal_lengths(reference, tmp_path):
    """Checks GPT2Model as AudioLDM-2 uses it: vectors in, hidden states out."""
    reference.save_pretrained(tmp_path / "theirs")
    module, params = from_pretrained(tmp_path / "theirs")
    assert module.config.family == MODEL
    vectors = np.random.default_rng(0).normal(size=(2, 9, 24)).astype(np.float32)
    mask = (np.arange(9)[None] < np.array([[9], [6]])).astype(np.int32)

    @jax.jit
    def states(params, vectors, segments):
        return module.apply({"params": params}, None, None, segments, embeddings=vectors, project=False).x

    ours = states(params, vectors, mask)
    theirs = states_of(reference, inputs_embeds=torch.tensor(vectors), attention_mask=torch.tensor(mask))
    for row, n in enumerate((9, 6)):
        np.testing.assert_allclose(ours[row, :n], theirs[row, :n], atol=2e-5)

    save_pretrained(module, params, tmp_path / "ours")
    opened, info = transformers.GPT2Model.from_pretrained(tmp_path / "ours", output_loading_info=True)
    assert not any(info[what] for what in ("missing_keys", "unexpected_keys", "mismatched_keys")), info
    kept = reference.state_dict()
    assert all(torch.equal(tensor, kept[name]) for name, tensor in opened.state_dict().items())
    assert load_file(tmp_path / "ours" / "model.safetensors").keys() == kept.keys()


def test_older_folders_and_the_names_of_the_other_class(reference, tmp_path):
    """Checks the published GPT-2: names without a prefix under a class with a head, and masks among the weights."""
    reference.save_pretrained(tmp_path)
    _, wanted = from_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    masks = {f"h.{i}.attn.bias": torch.ones(1, 1, 20, 20).tril() for i in range(3)}
    text = (tmp_path / "config.json").read_text()
    for family, prefix in ((WITH_HEAD, ""), (WITH_HEAD, "transformer."), (MODEL, "transformer.")):
        named = {f"{prefix}{name}": tensor for name, tensor in (tensors | masks).items()}
        save_file(named, tmp_path / "model.safetensors", {"format": "pt"})
        (tmp_path / "config.json").write_text(text.replace(MODEL, family))
        module, params = from_pretrained(tmp_path)
        assert module.config.family == family
        assert jax.tree.all(jax.tree.map(lambda a, b: bool((a == b).all()), params, wanted))


@pytest.mark.parametrize(
    "options,count",
    [
        ({}, 124_439_808),
        (dict(n_embd=1600, n_layer=48, n_head=25), 1_557_611_200),
        (dict(tie_word_embeddings=False), 124_439_808 + 50257 * 768),
    ],
)
def test_full_sizes(options, count):
    abstract = nn.meta.unbox(abstract_params(read(**options), FAMILIES[0]))
    with torch.device("meta"):
        reference = transformers.GPT2LMHeadModel(transformers.GPT2Config(**options))
    assert sum(leaf.size for leaf in jax.tree.leaves(abstract)) == count
    assert sum(p.numel() for p in reference.parameters()) == count


@pytest.mark.parametrize(
    "family,option,message",
    [
        (WITH_HEAD, dict(scale_attn_weights=False), "scale_attn_weights=False"),
        (WITH_HEAD, dict(scale_attn_by_inverse_layer_idx=True), "scale_attn_by_inverse_layer_idx=True"),
        (WITH_HEAD, dict(reorder_and_upcast_attn=2), "reorder_and_upcast_attn=2"),
        (WITH_HEAD, dict(add_cross_attention=True), "add_cross_attention=True"),
        (WITH_HEAD, dict(activation_function="tanh"), "activation_function='tanh'"),
        (WITH_HEAD, dict(n_head=7), "n_head=7"),
        (WITH_HEAD, dict(n_inner=0), "n_inner=0"),
        (WITH_HEAD, dict(rope_theta=1.0), "rope_theta=1.0"),
        (MODEL, dict(tie_word_embeddings=False), "tie_word_embeddings=False"),
        ("GPT2DoubleHeadsModel", {}, "GPT2DoubleHeadsModel"),
    ],
)
def test_options_that_are_refused_by_name(family, option, message):
    with pytest.raises(ConfigError, match=message):
        read(family, **option)


@pytest.mark.parametrize(
    "change,message",
    [
        (dict(qkv_bias=False), "qkv_bias=False"),
        (dict(num_kv_heads=2), "num_kv_heads=2"),
        (dict(position_offset=2), "position_offset=2"),
        (dict(norm_first=False), "norm_first=False"),
        (dict(head_dim=32), "head_dim=32"),
    ],
)
def test_switches_that_the_family_does_not_have_are_not_written(change, message):
    with pytest.raises(ConfigError, match=message):
        to_hf_config(change_fields(read(), **change))
