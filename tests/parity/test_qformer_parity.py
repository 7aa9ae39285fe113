"""The Q-Former against Blip2QFormerModel, InstructBlipQFormerModel and numbers recorded from LAVIS."""

from __future__ import annotations

from dataclasses import replace

import jax
import numpy as np
import pytest
import torch
import transformers
from qformer_reference import LAVIS, golden, golden_config, loaded
from transformers.models.blip_2.modeling_blip_2 import Blip2QFormerModel, Blip2TextEmbeddings
from transformers.models.instructblip.modeling_instructblip import InstructBlipQFormerModel

from mllm_jax.projectors.qformer import QFormerConfig

SIZES = dict(
    hidden_size=24,
    num_hidden_layers=6,
    num_attention_heads=4,
    intermediate_size=40,
    cross_attention_frequency=3,
    encoder_hidden_size=20,
    vocab_size=37,
    max_position_embeddings=16,
    # Large enough to show: with the default of 1e-12 any value would pass.
    layer_norm_eps=0.05,
)
CONFIG = QFormerConfig(
    feature_size=20,
    hidden_size=24,
    num_layers=6,
    num_heads=4,
    mlp_size=40,
    num_queries=5,
    cross_attention_frequency=3,
    norm_eps=0.05,
    vocab_size=37,
    max_length=16,
)


class Reference(torch.nn.Module):
    """A Q-Former with the modules that transformers keeps beside it."""

    def __init__(self, qformer, embeddings=None):
        super().__init__()
        self.query_tokens = torch.nn.Parameter(torch.zeros(1, CONFIG.num_queries, CONFIG.hidden_size))
        self.qformer = qformer
        if embeddings is not None:
            self.embeddings = embeddings


def inputs():
    """Returns features of three images, texts of unequal lengths and their masks."""
    rng = np.random.default_rng(3)
    features = rng.normal(size=(3, 7, CONFIG.feature_size)).astype(np.float32)
    tokens = rng.integers(0, CONFIG.vocab_size, (3, 6)).astype(np.int32)
    return features, tokens, (np.arange(6)[None] < np.array([[6], [4], [2]])).astype(np.int32)


def run(params, method: str, *arguments, config=CONFIG, **options):
    return jax.jit(lambda p: config.make().apply({"params": p}, *arguments, **options, method=method))(params)


def test_blip2(randomise, to_numpy, assert_close, tmp_path):
    config = transformers.Blip2QFormerConfig(**SIZES, use_qformer_text_input=True)
    reference = randomise(Reference(Blip2QFormerModel(config), Blip2TextEmbeddings(config)))
    params = loaded(CONFIG, to_numpy(reference.state_dict()), tmp_path, embeddings="embeddings")
    features, tokens, real = inputs()
    query = reference.query_tokens.expand(3, -1, -1)
    mask = torch.cat([torch.ones(3, CONFIG.num_queries), torch.tensor(real)], dim=1)
    with torch.no_grad():
        alone = reference.qformer(query, encoder_hidden_states=torch.tensor(features)).last_hidden_state
        embedded = reference.embeddings(torch.tensor(tokens), query_embeds=query)
        both = reference.qformer(
            embedded, CONFIG.num_queries, attention_mask=mask, encoder_hidden_states=torch.tensor(features)
        ).last_hidden_state
        embedded = reference.embeddings(torch.tensor(tokens))
        text = reference.qformer(embedded, 0, attention_mask=torch.tensor(real)).last_hidden_state
    assert_close(run(params, "__call__", features), alone, 1e-5, "queries")
    assert_close(run(params, "encode", features, tokens, real)[0], both, 1e-5, "queries and text")
    assert_close(run(params, "read", tokens, real), text, 1e-5, "text")


@pytest.mark.parametrize("layers,frequency", [(3, 2), (5, 3), (1, 2)])
def test_a_frequency_that_does_not_divide_the_layers(layers, frequency, randomise, to_numpy, assert_close, tmp_path):
    sizes = dict(num_hidden_layers=layers, cross_attention_frequency=frequency)
    theirs = transformers.Blip2QFormerConfig(**SIZES | sizes, use_qformer_text_input=True)
    reference = randomise(Reference(Blip2QFormerModel(theirs), Blip2TextEmbeddings(theirs)))
    config = replace(CONFIG, num_layers=layers, cross_attention_frequency=frequency)
    params = loaded(config, to_numpy(reference.state_dict()), tmp_path, embeddings="embeddings")
    features, tokens, real = inputs()
    query = reference.query_tokens.expand(3, -1, -1)
    mask = torch.cat([torch.ones(3, CONFIG.num_queries), torch.tensor(real)], dim=1)
    with torch.no_grad():
        embedded = reference.embeddings(torch.tensor(tokens), query_embeds=query)
        both = reference.qformer(
            embedded, CONFIG.num_queries, attention_mask=mask, encoder_hidden_states=torch.tensor(features)
        ).last_hidden_state
    assert_close(run(params, "encode", features, tokens, real, config=config)[0], both, 1e-5, "queries and text")


def test_instructblip(randomise, to_numpy, assert_close, tmp_path):
    reference = randomise(Reference(InstructBlipQFormerModel(transformers.InstructBlipQFormerConfig(**SIZES))))
    params = loaded(CONFIG, to_numpy(reference.state_dict()), tmp_path, norm="qformer.embeddings.layernorm")
    features, tokens, real = inputs()
    mask = torch.cat([torch.ones(3, CONFIG.num_queries), torch.tensor(real)], dim=1)
    with torch.no_grad():
        theirs = reference.qformer(
            torch.tensor(tokens),
            mask,
            query_embeds=reference.query_tokens.expand(3, -1, -1),
            encoder_hidden_states=torch.tensor(features),
        ).last_hidden_state
    assert_close(run(params, "encode", features, tokens, real)[0], theirs, 1e-5, "queries and instruction")


def test_biases_that_a_softmax_hides(randomise, to_numpy, tmp_path):
    config = transformers.Blip2QFormerConfig(**SIZES, use_qformer_text_input=True)
    reference = randomise(Reference(Blip2QFormerModel(config), Blip2TextEmbeddings(config)))
    tensors = to_numpy(reference.state_dict())
    params = loaded(CONFIG, tensors, tmp_path, embeddings="embeddings")
    for layer, (group, place) in {0: (0, 0), 1: (0, 1), 3: (1, 0), 5: (1, 2)}.items():
        held = params["layers"][f"layer_{place}"]
        stored = tensors[f"qformer.encoder.layer.{layer}.attention.attention.key.bias"]
        np.testing.assert_array_equal(np.asarray(held["attention"]["k"]["bias"][group]).ravel(), stored)
    stored = tensors["qformer.encoder.layer.3.crossattention.attention.key.bias"]
    np.testing.assert_array_equal(
        np.asarray(params["layers"]["layer_0"]["cross_attention"]["k"]["bias"][1]).ravel(), stored
    )


# ---- LAVIS


@pytest.fixture(scope="module")
def stage1(tmp_path_factory):
    arrays, sizes = golden("blip2_qformer_stage1")
    config = golden_config(sizes)
    tensors = {name.removeprefix("weights/"): arrays[name] for name in arrays.files if name.startswith("weights/")}
    tensors = {name: t for name, t in tensors.items() if not name.endswith("position_ids")}
    return arrays, config, loaded(config, tensors, tmp_path_factory.mktemp("stage1"), **LAVIS), sizes


def test_the_three_masks(stage1, assert_close):
    arrays, config, params, sizes = stage1
    features = arrays["outputs/image_embeds_after_ln_vision"]
    tokens, real = (arrays[f"inputs/text_{name}"].astype(np.int32) for name in ("input_ids", "attention_mask"))
    queries = config.num_queries

    @jax.jit
    def everything(params):
        module = config.make()

        def apply(method, *arguments, **options):
            return module.apply({"params": params}, *arguments, **options, method=method)

        alone, cache = apply("encode", features)
        masked, _ = apply("encode", features, feature_segments=arrays["inputs/image_attention_mask"].astype(np.int32))
        both, _ = apply("encode", features, tokens, real)
        started = np.concatenate([np.full((4, 1), sizes["bos_token_id"]), tokens[:, 1:]], axis=1)
        return alone, cache, masked, both, apply("read", tokens, real), apply("read", started, real, cache)

    alone, cache, masked, both, text, written = everything(params)
    assert_close(alone, arrays["outputs/query_only/hidden4"], 1e-5, "queries")
    assert_close(masked, arrays["outputs/query_only_masked_image/last_hidden"], 1e-5, "some features are padding")
    stored = arrays["outputs/query_only/past_key_layer0"].transpose(0, 2, 1, 3)
    assert_close(cache.keys[0, 0], stored, 1e-5, "keys of the first layer")
    stored = arrays["outputs/query_only/past_value_lastlayer"].transpose(0, 2, 1, 3)
    assert_close(cache.values[-1, -1], stored, 1e-5, "values of the last layer")
    assert_close(text, arrays["outputs/text_only/last_hidden"], 1e-5, "text alone: padding sees the text too")
    assert_close(both, arrays["outputs/bidirectional/hidden4"], 1e-5, "both ways")
    assert_close(written, arrays["outputs/itg/last_hidden"], 1e-5, "causal over cached queries")
    joint = arrays["outputs/itg/joint_unilm_last_hidden"][:, queries:]
    assert_close(np.asarray(written)[real > 0], joint[real > 0], 1e-5, "one pass with a mask")


def test_instruction_aware_features(assert_close, tmp_path):
    arrays, sizes = golden("instructblip_qformer")
    config = golden_config(sizes, output_size=sizes["llm"]["hidden"])
    tensors = {name.removeprefix("weights/"): arrays[name] for name in arrays.files if name.startswith("weights/")}
    tensors = {n: t for n, t in tensors.items() if not n.endswith("position_ids") and not n.startswith("llm_model")}
    params = loaded(config, tensors, tmp_path, **LAVIS)
    # The vision encoder's last norm, which LAVIS has outside of it.
    x = arrays["inputs/image_embeds"]
    x = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-5)
    features = x * tensors["ln_vision.weight"] + tensors["ln_vision.bias"]
    tokens, real = (arrays[f"inputs/qformer_{name}"].astype(np.int32) for name in ("input_ids", "attention_mask"))
    hidden = run(params, "encode", features, tokens, real, config=config)[0]
    assert_close(hidden, arrays["outputs/qformer_last_hidden"], 1e-5, "hidden states")
    media = run(params, "__call__", features, tokens, real, config=config)
    assert media.shape[1] == config.num_tokens(2)
    assert_close(media, arrays["outputs/inputs_llm"], 1e-5, "media tokens")
