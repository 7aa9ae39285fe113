"""T5: the cache equals one full pass, packing, embeddings, the options of its config.json."""

from __future__ import annotations

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from mllm_jax.checkpoints.fields import change_fields
from mllm_jax.errors import ConfigError, DataError
from mllm_jax.layers.compute import Compute
from mllm_jax.llms.t5 import T5Config, T5Dialect, from_hf_config, sample, table, to_hf_config

CONFIG = T5Config(
    vocab_size=37,
    hidden_size=16,
    head_dim=6,
    mlp_size=20,
    num_layers=2,
    num_decoder_layers=3,
    num_heads=2,
    activation="gelu_tanh",
    dialect=T5Dialect(num_buckets=8, max_distance=10, gated=True),
)
LENGTHS = np.array([7, 4])  # of the sources


@pytest.fixture(scope="module")
def model():
    """Returns (parameters, full pass, start, pass with a cache), compiled once."""
    module = CONFIG.make()
    abstract = nn.meta.unbox(jax.eval_shape(lambda: module.init(jax.random.key(0), *sample(CONFIG))))
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda x: 0.4 * rng.normal(size=x.shape).astype(np.float32), abstract)
    full = jax.jit(lambda *args, **kwargs: module.apply(params, *args, **kwargs))
    start = jax.jit(lambda *args: module.apply(params, *args, size=12, method="start"))
    step = jax.jit(lambda tokens, segments, cache: module.apply(params, tokens, None, segments, cache=cache))
    return params, full, start, step


@pytest.fixture(scope="module")
def texts():
    """Returns (source tokens, source segments, target tokens): rows of unequal length, padded on the right."""
    rng = np.random.default_rng(0)
    return rng.integers(0, 37, (2, 7)), (np.arange(7) < LENGTHS[:, None]).astype(np.int32), rng.integers(0, 37, (2, 12))


def test_token_by_token_equals_the_full_pass(model, texts):
    _, full, start, step = model
    source, segments, target = texts
    wanted = full(source, None, segments, target)
    cache = start(source, None, segments)
    for i in range(12):
        logits, cache = step(target[:, i : i + 1], None, cache)
        np.testing.assert_allclose(logits[:, 0], wanted[:, i], atol=2e-5)
    assert cache.length.tolist() == [12, 12]


def test_prefixes_of_unequal_length_then_tokens(model, texts):
    """Checks that padding takes no position in the cache, so that each row continues after its own end."""
    _, full, start, step = model
    source, segments, target = texts
    wanted = full(source, None, segments, target)
    real = (np.arange(6) < np.array([[6], [3]])).astype(np.int32)
    logits, cache = step(np.where(real > 0, target[:, :6], 5), real, start(source, None, segments))
    for row, n in enumerate((6, 3)):
        np.testing.assert_allclose(logits[row, :n], wanted[row, :n], atol=2e-5)
    second = np.stack([target[0, 6:10], target[1, 3:7]])
    logits, cache = step(second, np.ones((2, 4), np.int32), cache)
    np.testing.assert_allclose(logits[0], wanted[0, 6:10], atol=2e-5)
    np.testing.assert_allclose(logits[1], wanted[1, 3:7], atol=2e-5)
    assert cache.length.tolist() == [10, 7] and cache.positions[1, :7].tolist() == list(range(7))


def test_the_cache_of_a_start_has_the_shapes_of_an_empty_one(model, texts):
    source, segments, _ = texts
    started, empty = model[2](source, None, segments), CONFIG.make_cache(2, 12, source=7)
    assert jax.tree.map(jnp.shape, started) == jax.tree.map(jnp.shape, empty)
    assert started.keys.shape == (3, 2, 12, 2, 6) and started.cross_keys.shape == (3, 2, 7, 2, 6)
    np.testing.assert_array_equal(started.cross_segments, segments)


def test_packed_examples_do_not_see_each_other(model):
    """Checks that a change in one example's source or target leaves the other's logits equal to the last bit."""
    _, full, *_ = model
    rng = np.random.default_rng(1)
    source, target = rng.integers(0, 36, (2, 1, 12))
    segments = np.array([[1] * 5 + [2] * 5 + [0] * 2])
    kwargs = dict(positions=np.array([[*range(5), *range(5), 0, 0]]), segments=segments, decoder_segments=segments)
    before = full(source, decoder_tokens=target, **kwargs)
    for changed, kept in ((slice(0, 5), slice(5, 10)), (slice(5, 10), slice(0, 5)), (slice(10, 12), slice(0, 10))):
        for side in (0, 1):
            texts = [source.copy(), target.copy()]
            texts[side][0, changed] = 36
            after = full(texts[0], decoder_tokens=texts[1], **kwargs)
            np.testing.assert_array_equal(before[0, kept], after[0, kept])
            assert np.abs(before[0, changed] - after[0, changed]).max() > 1e-3


def test_only_differences_of_positions_count(model, texts):
    """Checks that a shift of a text in its row changes nothing, and the order of its tokens does."""
    _, full, *_ = model
    source, _, target = texts
    wanted = full(source, decoder_tokens=target)
    shifted = dict(positions=np.arange(7)[None] + 40, decoder_positions=np.arange(12)[None] + 9)
    np.testing.assert_array_equal(full(source, decoder_tokens=target, **shifted), wanted)
    spread = full(source, decoder_tokens=target, decoder_positions=3 * np.arange(12)[None])
    assert np.abs(spread - wanted).max() > 1e-3


def test_embeddings_stand_in_for_source_tokens(model, texts):
    params, full, *_ = model
    source, segments, target = texts
    module = CONFIG.make()
    embedded = module.apply(params, source, method="embed")
    wanted = full(source, None, segments, target)
    blank = np.zeros_like(source)
    np.testing.assert_array_equal(full(blank, None, segments, target, embeddings=embedded), wanted)
    encoded = module.apply(params, blank, None, segments, embeddings=embedded, method="encode")
    decoded = module.apply(params, target, source=encoded, source_segments=segments, method="decode")
    np.testing.assert_allclose(decoded, wanted, atol=2e-5)


def test_remat_and_unrolling_change_nothing(model, texts):
    params, full, *_ = model
    source, segments, target = texts
    other = replace(CONFIG, compute=Compute(remat="full", scan_unroll=3)).make()
    np.testing.assert_allclose(
        jax.jit(other.apply)(params, source, None, segments, target), full(source, None, segments, target), atol=2e-5
    )


def test_bfloat16_computes_and_caches_in_it():
    half = replace(CONFIG, compute=Compute(dtype="bfloat16"))
    abstract = nn.meta.unbox(jax.eval_shape(half.make().init, jax.random.key(0), *sample(half)))
    assert {leaf.dtype for leaf in jax.tree.leaves(abstract)} == {jnp.dtype("float32")}
    assert jax.eval_shape(half.make().apply, abstract, *sample(half)).dtype == jnp.float32
    assert half.make_cache(1, 4).cross_keys.dtype == jnp.bfloat16


def test_a_missing_half_is_refused(model):
    params, full, *_ = model
    tokens = np.zeros((1, 3), np.int32)
    with pytest.raises(DataError, match="without decoder_tokens"):
        full(tokens)
    with pytest.raises(DataError, match="without a source"):
        CONFIG.make().apply(params, tokens, method="decode")


# ---- config.json

FLAN = dict(
    architectures=["T5ForConditionalGeneration"],
    model_type="t5",
    d_ff=1024,
    d_kv=64,
    d_model=512,
    decoder_start_token_id=0,
    dropout_rate=0.1,
    eos_token_id=1,
    feed_forward_proj="gated-gelu",
    initializer_factor=1.0,
    is_encoder_decoder=True,
    layer_norm_epsilon=1e-6,
    n_positions=512,
    num_decoder_layers=8,
    num_heads=6,
    num_layers=8,
    output_past=True,
    pad_token_id=0,
    relative_attention_max_distance=128,
    relative_attention_num_buckets=32,
    task_specific_params={"summarization": {"max_length": 200}},
    tie_word_embeddings=False,
    transformers_version="4.23.1",
    use_cache=True,
    vocab_size=32128,
)


def test_a_config_of_the_hub():
    c = from_hf_config(FLAN)
    assert (c.activation, c.dialect.gated, c.tie_word_embeddings) == ("gelu_tanh", True, False)
    assert (c.num_layers, c.num_heads, c.head_dim, c.mlp_size) == (8, 6, 64, 1024)
    assert from_hf_config(FLAN | {"dense_act_fn": "gelu"}).activation == "gelu", "BLIP-2 overrides it so"
    first = {k: v for k, v in FLAN.items() if k not in ("feed_forward_proj", "tie_word_embeddings")}
    c = from_hf_config(first | {"num_decoder_layers": None})
    assert (c.activation, c.dialect.gated, c.tie_word_embeddings, c.num_decoder_layers) == ("relu", False, True, 8)
    # transformers 5 writes this for an untied head.
    assert not from_hf_config(FLAN | {"tie_word_embeddings": True, "scale_decoder_outputs": False}).tie_word_embeddings


@pytest.mark.parametrize("activation", ["relu", "gelu", "gelu_tanh", "silu", "quick_gelu"])
@pytest.mark.parametrize("gated", [False, True])
def test_config_both_ways(activation, gated):
    c = change_fields(CONFIG, activation=activation, gated=gated, tie_word_embeddings=gated, eos_token_id=(1, 3))
    assert from_hf_config(to_hf_config(c)) == c


def test_copies_of_the_embedding_are_ignored():
    tied, untied = table(CONFIG), table(replace(CONFIG, tie_word_embeddings=False))
    for name in ("encoder.embed_tokens.weight", "decoder.embed_tokens.weight"):
        assert name in tied.ignored and name in untied.ignored
    assert "lm_head.weight" in tied.ignored
    assert "lm_head.weight" in [line.name for line in untied.weights] and "lm_head.weight" not in untied.ignored


@pytest.mark.parametrize(
    "change,message",
    [
        (dict(feed_forward_proj="gated-mish"), "feed_forward_proj='gated-mish'"),
        (dict(feed_forward_proj="double-gelu"), "feed_forward_proj='double-gelu'"),
        (dict(dense_act_fn="mish"), "dense_act_fn='mish'"),
        (dict(tie_encoder_decoder=True), "tie_encoder_decoder=True"),
        (dict(is_decoder=True), "is_decoder=True"),
        (dict(pruned_heads={"0": [1]}), "pruned_heads"),
        (dict(scalable_attention=True), "scalable_attention=True"),
        (dict(relative_attention_num_buckets=2), "1 buckets a direction"),
        (dict(relative_attention_max_distance=16), "max_distance 16"),
    ],
)
def test_options_that_are_refused(change, message):
    with pytest.raises(ConfigError, match=message):
        from_hf_config(FLAN | change)


def test_an_unknown_activation_is_refused():
    with pytest.raises(ConfigError, match="activation 'gelu_new'"):
        T5Config(activation="gelu_new")
