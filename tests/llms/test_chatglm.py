"""ChatGLM-6B: the prefix mask, the marks inside a text, the cache, the options of its config.json."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from mllm_jax.errors import ConfigError
from mllm_jax.layers.compute import Compute
from mllm_jax.llms.chatglm import FAR, ChatGLMConfig, find_marks, from_hf_config, is_v1, to_hf_config, two_positions

BOS, EOS, PAD, MASK, GMASK = range(5)
CONFIG = ChatGLMConfig(
    vocab_size=31,
    hidden_size=16,
    num_layers=2,
    num_heads=2,
    mlp_size=20,
    bos_token_id=BOS,
    eos_token_id=(EOS,),
    pad_token_id=PAD,
    mask_token_id=MASK,
    gmask_token_id=GMASK,
)
# A context of 5 and one of 3, each with its mark before bos; the second row has an earlier MASK.
TOKENS = np.array([[11, 12, 13, 14, GMASK, BOS, 15, 16, 17, 18], [19, MASK, 20, BOS, 21, 22, 23, 24, 25, 26]])


@pytest.fixture(scope="module")
def model():
    """Returns (parameters, full pass, pass with a cache), compiled once."""
    module = CONFIG.make()
    abstract = nn.meta.unbox(jax.eval_shape(lambda: module.init(jax.random.key(0), TOKENS)))
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda x: 0.4 * rng.normal(size=x.shape).astype(np.float32), abstract)
    full = jax.jit(lambda *args, **kwargs: module.apply(params, *args, **kwargs))
    step = jax.jit(lambda tokens, segments, cache: module.apply(params, tokens, None, segments, cache=cache))
    return params, full, step


@pytest.mark.parametrize(
    "tokens,wanted",
    [
        ([9, GMASK, BOS, 9, 9], [[0, 1, 1, 1, 1], [0, 0, 1, 2, 3]]),
        ([9, MASK, 9, BOS, 9], [[0, 1, 2, 1, 1], [0, 0, 0, 1, 2]]),
        ([MASK, GMASK, 9, BOS, 9], [[0, 1, 2, 1, 1], [0, 0, 0, 1, 2]]),
        ([9, BOS, 9, GMASK, BOS], [[0, 3, 3, 3, 3], [0, 1, 2, 3, 4]]),
        ([9, 9, BOS, 9, 9], [[0, 1, 1, 1, 1], [0, 0, 1, 2, 3]]),
        ([9, GMASK, 9, 9, 9], [[0, 1, 2, 3, 4], [0, 0, 0, 0, 0]]),
    ],
    ids=["gmask", "mask", "gmask before mask", "the first of each", "no mark", "no bos"],
)
def test_positions(tokens, wanted):
    indices = np.arange(5)[None]
    positions = two_positions(indices, find_marks(CONFIG, np.array([tokens]), indices, None))
    assert positions.tolist() == [wanted]


def test_the_context_sees_itself_and_the_answer_what_came_before(model):
    _, full, _ = model
    before = np.asarray(full(TOKENS))
    for changed, unmoved in ((4, 0), (7, 7), (9, 9)):
        other = TOKENS.copy()
        other[0, changed] = 30 if changed != 4 else MASK  # one mark for another: positions stay
        after = np.asarray(full(other))
        np.testing.assert_array_equal(before[0, :unmoved], after[0, :unmoved])
        assert (np.abs(before[0, unmoved:] - after[0, unmoved:]).max(axis=-1) > 1e-4).all()
        np.testing.assert_array_equal(before[1], after[1])


def test_token_by_token_equals_the_full_pass(model):
    """Checks prompts of unequal length, each with its context and bos; then one token at a time."""
    _, full, step = model
    wanted = np.asarray(full(TOKENS))
    lengths = np.array([7, 4])
    real = np.arange(7)[None] < lengths[:, None]
    logits, cache = step(np.where(real, TOKENS[:, :7], BOS), real.astype(np.int32), CONFIG.make_cache(2, 10))
    for row, n in enumerate(lengths):
        np.testing.assert_allclose(logits[row, :n], wanted[row, :n], atol=2e-5)
    assert cache.marks.tolist() == [[5, 4, FAR], [3, FAR, 1]]
    for i in range(3):
        index = lengths + i
        logits, cache = step(TOKENS[[0, 1], index][:, None], np.ones((2, 1), np.int32), cache)
        np.testing.assert_allclose(logits[:, 0], wanted[[0, 1], index], atol=2e-5)
    assert cache.length.tolist() == [10, 7]


def test_packed_texts_do_not_see_each_other(model):
    _, full, _ = model
    row = np.concatenate([TOKENS[1, :6], TOKENS[0, :8]])[None]
    segments = np.repeat([1, 2], [6, 8])[None]
    together, alone = np.asarray(full(row, None, segments))[0], np.asarray(full(TOKENS))
    np.testing.assert_allclose(together[:6], full(TOKENS[1:, :6])[0], atol=2e-5)
    np.testing.assert_allclose(together[6:], full(TOKENS[:1, :8])[0], atol=2e-5)
    np.testing.assert_allclose(together[:6], alone[1, :6], atol=2e-5)  # later tokens of the answer have no effect


def test_positions_may_be_given(model):
    _, full, _ = model
    indices = np.tile(np.arange(10), (2, 1))
    positions = two_positions(indices, find_marks(CONFIG, TOKENS, indices, None))
    np.testing.assert_array_equal(full(TOKENS, positions), full(TOKENS))
    np.testing.assert_array_equal(full(TOKENS, indices), full(TOKENS))
    assert np.abs(full(TOKENS, positions.at[:, 1].add(1)) - full(TOKENS)).max() > 1e-3


def test_embeddings_and_chosen_logits(model):
    params, full, _ = model
    embedded = CONFIG.make().apply(params, TOKENS, method="embed")
    np.testing.assert_array_equal(full(TOKENS, embeddings=embedded), full(TOKENS))
    at = np.array([[9], [3]])
    np.testing.assert_allclose(full(TOKENS, logits_at=at)[:, 0], full(TOKENS)[[0, 1], at[:, 0]], atol=1e-6)


def test_bfloat16_computes_and_caches_in_it():
    half = ChatGLMConfig(**{**vars(CONFIG), "compute": Compute("bfloat16")})
    abstract = nn.meta.unbox(jax.eval_shape(half.make().init, jax.random.key(0), TOKENS))
    assert {leaf.dtype for leaf in jax.tree.leaves(abstract)} == {jnp.dtype("float32")}
    assert jax.eval_shape(half.make().apply, abstract, TOKENS).dtype == jnp.float32
    assert half.make_cache(1, 4).keys.dtype == jnp.bfloat16


def test_config_both_ways():
    written = to_hf_config(CONFIG)
    assert from_hf_config(written) == CONFIG
    assert written["architectures"] == ["ChatGLMModel"] and written["inner_hidden_size"] == 20
    assert written["eos_token_id"] == EOS


def test_versions_are_distinguished():
    assert is_v1(to_hf_config(CONFIG)) and is_v1({"position_encoding_2d": True})
    second = {"architectures": ["ChatGLMModel"], "ffn_hidden_size": 13696, "multi_query_attention": True}
    assert not is_v1(second)
    with pytest.raises(ConfigError, match="mllm_jax.llms.glm"):
        from_hf_config(second)


@pytest.mark.parametrize(
    "change,message",
    [
        (dict(position_encoding_2d=False), "position_encoding_2d=False"),
        (dict(quantization_bit=4), "quantization_bit=4"),
        (dict(pre_seq_len=128), "pre_seq_len=128"),
        (dict(prefix_projection=True), "prefix_projection=True"),
        (dict(tie_word_embeddings=True), "tie_word_embeddings=True"),
        (dict(gmask_token_id=None), "without 'gmask_token_id'"),
        (dict(some_new_switch=1), "some_new_switch=1"),
        (dict(num_attention_heads=3), "hidden_size 16 for 3 heads"),
    ],
)
def test_options_that_are_refused(change, message):
    with pytest.raises(ConfigError, match=message):
        from_hf_config(to_hf_config(CONFIG) | change)
