"""The decoder's cache: reading in chunks gives the same as one full pass."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from mllm_jax.checkpoints.fields import change_fields, make_config
from mllm_jax.errors import ConfigError
from mllm_jax.layers.compute import Compute
from mllm_jax.layers.rotary import RopeScaling
from mllm_jax.llms.decoder import DecoderConfig, DecoderDialect

CONFIG = DecoderConfig(
    vocab_size=37, hidden_size=20, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=6, mlp_size=24, qk_norm=True
)
LENGTHS = np.array([7, 4])
RULE_NAMES = ("layers", "embed", "heads", "kv_heads", "head_dim", "mlp", "vocab")


def random_params(module, *args):
    """Returns random parameters, without compiling `init`."""
    abstract = nn.meta.unbox(jax.eval_shape(lambda: module.init(jax.random.key(0), *args)))
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda x: 0.4 * rng.normal(size=x.shape).astype(np.float32), abstract)


@pytest.fixture(scope="module")
def decoder():
    """Returns (parameters, full pass, pass with a cache), compiled once."""
    module = CONFIG.make()
    params = random_params(module, jnp.ones((1, 4), jnp.int32))
    full = jax.jit(lambda *args, **kwargs: module.apply(params, *args, **kwargs))
    step = jax.jit(lambda tokens, segments, cache: module.apply(params, tokens, None, segments, cache=cache))
    return params, full, step


@pytest.fixture(scope="module")
def prompts():
    tokens = np.random.default_rng(0).integers(0, 37, (2, 12))
    return tokens, (np.arange(12)[None] < LENGTHS[:, None]).astype(np.int32)


def test_token_by_token_equals_the_full_pass(decoder, prompts):
    """Checks rows of unequal length: each continues after its own end, at the next positions."""
    _, full, step = decoder
    tokens, _ = prompts
    wanted = full(tokens)
    prefix = np.where(np.arange(7)[None] < LENGTHS[:, None], tokens[:, :7], 35)
    segments = (np.arange(7)[None] < LENGTHS[:, None]).astype(np.int32)
    logits, cache = step(prefix, segments, CONFIG.make_cache(2, 12))
    for row, n in enumerate(LENGTHS):
        np.testing.assert_allclose(logits[row, :n], wanted[row, :n], atol=2e-5)
    assert cache.length.tolist() == LENGTHS.tolist()
    for i in range(5):
        index = LENGTHS + i
        logits, cache = step(tokens[[0, 1], index][:, None], np.ones((2, 1), np.int32), cache)
        np.testing.assert_allclose(logits[:, 0], wanted[jnp.arange(2), index], atol=2e-5)
    assert cache.length.tolist() == (LENGTHS + 5).tolist()


def test_a_prompt_in_two_chunks_equals_one(decoder, prompts):
    """Checks a first chunk that ends in padding in one row; the second continues after the real tokens."""
    _, full, step = decoder
    tokens, _ = prompts
    wanted = full(tokens)
    real = np.array([6, 2])
    first = np.where(np.arange(6)[None] < real[:, None], tokens[:, :6], 36)
    _, cache = step(first, (np.arange(6)[None] < real[:, None]).astype(np.int32), CONFIG.make_cache(2, 12))
    second = np.stack([tokens[row, n : n + 5] for row, n in enumerate(real)])
    logits, cache = step(second, np.ones((2, 5), np.int32), cache)
    for row, n in enumerate(real):
        np.testing.assert_allclose(logits[row], wanted[row, n : n + 5], atol=2e-5)
    assert cache.segments.tolist() == [[1] * 11 + [0], [1] * 7 + [0] * 5]


def test_padding_takes_no_place_in_the_cache(prompts):
    _, segments = prompts
    cache, index = CONFIG.make_cache(2, 9).reserve(segments)
    for row, n in enumerate(LENGTHS):
        assert index[row, :n].tolist() == list(range(n))
        assert (np.asarray(index[row, n:]) >= 9).all(), "padding must not be written"
    assert cache.length.tolist() == LENGTHS.tolist()
    assert cache.segments.sum(axis=1).tolist() == LENGTHS.tolist()


def test_packed_examples_do_not_see_each_other(decoder):
    """Checks that a change in one packed example leaves the other's logits equal to the last bit."""
    _, full, _ = decoder
    tokens = np.random.default_rng(1).integers(0, 37, (1, 12))
    segments = np.array([[1] * 5 + [2] * 5 + [0] * 2])
    positions = np.array([[*range(5), *range(5), 0, 0]])
    before = full(tokens, positions, segments)
    for changed, kept in ((slice(0, 5), slice(5, 10)), (slice(5, 10), slice(0, 5)), (slice(10, 12), slice(0, 10))):
        other = tokens.copy()
        other[0, changed] = (other[0, changed] + 1) % 37
        after = full(other, positions, segments)
        np.testing.assert_array_equal(before[0, kept], after[0, kept])
        assert np.abs(before[0, changed] - after[0, changed]).max() > 1e-3


def test_the_future_is_not_seen(decoder):
    _, full, _ = decoder
    tokens = np.random.default_rng(2).integers(0, 37, (1, 12))
    other = tokens.copy()
    other[0, 8:] = (other[0, 8:] + 1) % 37
    np.testing.assert_array_equal(full(tokens)[0, :8], full(other)[0, :8])


def test_embeddings_stand_in_for_tokens(decoder):
    params, full, _ = decoder
    tokens = np.random.default_rng(3).integers(0, 37, (2, 12))
    embedded = CONFIG.make().apply(params, tokens, method="embed")
    np.testing.assert_array_equal(full(tokens), full(np.zeros_like(tokens), embeddings=embedded))


def test_chosen_logits_are_those_of_their_places(decoder):
    _, full, _ = decoder
    tokens, positions = np.random.default_rng(3).integers(0, 37, (2, 12)), np.array([[3, 11], [0, 5]])
    wanted = np.take_along_axis(np.asarray(full(tokens)), positions[..., None], axis=1)
    np.testing.assert_allclose(full(tokens, logits_at=positions), wanted, atol=2e-5)


def test_learned_positions_end_with_their_table():
    """Checks that a token beyond the table gives NaN, which stops a run; padding may have such positions."""
    c = DecoderConfig(
        vocab_size=37,
        hidden_size=16,
        num_layers=1,
        mlp_size=24,
        dialect=DecoderDialect(positions="learned"),
        max_position_embeddings=6,
    )
    tokens = jnp.ones((1, 8), jnp.int32)
    params = random_params(c.make(), tokens[:, :6])
    positions, real = jnp.arange(8)[None], (jnp.arange(8) < 6).astype(jnp.int32)[None]
    assert np.isfinite(c.make().apply(params, tokens, positions, real)).all()
    assert np.isnan(c.make().apply(params, tokens, positions, jnp.ones_like(real))[0, 6:]).all()
    with pytest.raises(ConfigError, match="8 tokens(?s:.*)at most 6 positions"):
        c.make().apply(params, tokens)


def test_dynamic_frequencies_depend_only_on_the_own_text():
    """Checks that a long neighbour, in the row or in the batch, changes nothing; the own length does."""
    c = DecoderConfig(
        vocab_size=37,
        hidden_size=16,
        num_layers=1,
        mlp_size=24,
        dialect=DecoderDialect(rope_theta=20.0, rope_scaling=RopeScaling("dynamic", 9.0, 4)),
    )
    tokens = np.random.default_rng(0).integers(0, 37, (1, 12))
    params = random_params(c.make(), tokens)
    apply = jax.jit(c.make().apply)
    positions, segments = np.array([[*range(3), *range(9)]]), np.array([[1] * 3 + [2] * 9])
    together = apply(params, tokens, positions, segments)
    alone = apply(params, np.roll(tokens, -3), np.roll(positions, -3), np.roll(segments, -3))
    np.testing.assert_allclose(together[:, 3:], alone[:, :9], atol=1e-5)
    short = c.make().apply(params, tokens[:, :3])
    np.testing.assert_allclose(together[:, :3], short, atol=1e-5)
    as_one = apply(params, tokens, np.arange(12)[None], np.ones_like(segments))
    assert np.abs(as_one[:, 1:3] - short[:, 1:3]).max() > 1e-3


def test_logits_are_float32_in_bfloat16():
    c = DecoderConfig(vocab_size=37, hidden_size=16, num_layers=1, mlp_size=24, compute=Compute(dtype="bfloat16"))
    tokens = jnp.zeros((1, 4), jnp.int32)
    abstract = nn.meta.unbox(jax.eval_shape(c.make().init, jax.random.key(0), tokens))
    assert {leaf.dtype for leaf in jax.tree.leaves(abstract)} == {jnp.dtype("float32")}
    assert jax.eval_shape(c.make().apply, abstract, tokens).dtype == jnp.float32
    assert c.make_cache(1, 4).keys.dtype == jnp.bfloat16


def test_every_parameter_has_logical_names():
    """Checks a model with all options that add parameters."""
    switches = dict(qkv_bias=True, out_bias=True, mlp_bias=True, qk_norm=True, tie_word_embeddings=False)
    switches |= dict(norm="layer", positions="learned", embedding_size=8)
    c = make_config(DecoderConfig, vocab_size=37, hidden_size=16, num_layers=2, mlp_size=24, **switches)
    boxed = jax.eval_shape(c.make().init, jax.random.key(0), jnp.zeros((1, 4), jnp.int32))["params"]
    leaves = jax.tree.leaves_with_path(boxed, is_leaf=lambda x: isinstance(x, nn.LogicallyPartitioned))
    assert len(leaves) == 27
    for path, leaf in leaves:
        assert isinstance(leaf, nn.LogicallyPartitioned) and len(leaf.names) == leaf.value.ndim, path
        assert set(leaf.names) <= {*RULE_NAMES, None} and (leaf.names[0] == "layers") == ("layers" in str(path[0]))


def test_each_layer_starts_mimetic_with_numbers_of_its_own():
    config = DecoderConfig(
        vocab_size=11, hidden_size=96, num_layers=3, num_kv_heads=2, head_dim=32, mlp_size=8, mimetic_init=True
    )
    params = nn.meta.unbox(jax.jit(config.make().init)(jax.random.key(0), jnp.zeros((1, 4), jnp.int32)))
    q, k = (np.asarray(params["params"]["layers"]["attention"][name]["kernel"]) for name in "qk")
    for layer in range(3):
        product = q[layer, :, 0] @ k[layer, :, 0].T
        assert np.diag(product).mean() > 4 * product[~np.eye(96, dtype=bool)].std()
        assert np.abs(q[layer] - q[layer - 1]).max() > 0.1 and np.abs(k[layer] - k[layer - 1]).max() > 0.1
    assert not CONFIG.mimetic_init


@pytest.mark.parametrize(
    "change,message",
    [
        (dict(num_kv_heads=3), "key-value heads divide"),
        (dict(head_dim=7), "RoPE rotates pairs"),
        (dict(hidden_size=12), "RoPE"),
        (dict(partial_rotary_factor=1.5), "RoPE"),
        (dict(norm="batch"), "norm 'batch'.*rms, layer"),
        (dict(activation="selu"), "activation 'selu'"),
        (dict(positions="sinusoidal"), "rotary, learned"),
        (dict(norm_affine=False), "RMSNorm without scale"),
        (dict(layer_types=("full_attention",)), "layer_types.*for 4 layers"),
        (dict(layer_types=("linear_attention",) * 4), "full_attention, sliding_attention"),
        (dict(layer_types=("sliding_attention",) * 4), "no dialect.sliding_window"),
    ],
)
def test_impossible_sizes_are_refused(change, message):
    with pytest.raises(ConfigError, match=f"(?s){message}"):
        make_config(DecoderConfig, **dict(vocab_size=37, hidden_size=16, num_heads=4, num_kv_heads=2) | change)


# ---- three-part positions, and vectors that media add to the first layers

MROPE = DecoderConfig(
    vocab_size=37,
    hidden_size=16,
    num_layers=3,
    num_heads=2,
    num_kv_heads=1,
    mlp_size=24,
    dialect=DecoderDialect(mrope_sections=(2, 1, 1)),
)


@pytest.fixture(scope="module")
def mrope():
    module = MROPE.make()
    params = random_params(module, jnp.ones((1, 4), jnp.int32))
    return params, jax.jit(lambda *args, **kwargs: module.apply(params, *args, **kwargs))


def test_three_equal_parts_are_a_plain_position(mrope):
    _, full = mrope
    tokens = np.random.default_rng(1).integers(0, 37, (2, 6))
    counted = np.broadcast_to(np.arange(6), (2, 6))
    plain = full(tokens, counted)
    np.testing.assert_array_equal(full(tokens, np.stack([counted] * 3, axis=-1)), plain)
    other = np.stack([counted, counted, counted[:, ::-1]], axis=-1)
    assert np.abs(full(tokens, other) - plain).max() > 1e-3


def test_text_continues_after_the_largest_part(mrope):
    """Checks media with more or fewer positions than tokens; the cache stores where text resumes in each row."""
    _, full = mrope
    tokens = np.random.default_rng(2).integers(0, 37, (2, 9))
    read, resumed = np.array([6, 4]), np.array([4, 9])
    positions = np.zeros((2, 9, 3), np.int32)
    positions[0, :6] = [[0, 0, 0], [1, 1, 1], [1, 1, 2], [1, 2, 1], [1, 2, 2], [3, 3, 3]]
    positions[1, :4] = [[0, 0, 0], [1, 1, 8], [1, 4, 1], [1, 1, 1]]
    for row in range(2):
        positions[row, read[row] :] = (resumed[row] + np.arange(9 - read[row]))[:, None]
    wanted = full(tokens, positions)
    segments = (np.arange(6)[None] < read[:, None]).astype(np.int32)
    _, cache = full(tokens[:, :6], positions[:, :6], segments, cache=MROPE.make_cache(2, 9))
    assert (cache.length + cache.offset).tolist() == resumed.tolist()
    for i in range(3):
        index = read + i
        logits, cache = full(tokens[[0, 1], index][:, None], cache=cache)
        np.testing.assert_allclose(logits[:, 0], wanted[jnp.arange(2), index], atol=2e-5)


def test_deepstack_adds_after_the_first_layers(mrope):
    """Checks layer by layer: a decoder of one layer, given the sum, is the next layer of the whole decoder."""
    params, full = mrope
    rng = np.random.default_rng(3)
    x, *more = (rng.normal(size=(2, 5, 16)).astype(np.float32) for _ in range(3))
    tokens = np.zeros((2, 5), np.int32)
    found = full(tokens, embeddings=x, deepstack=tuple(more))
    assert np.abs(found - full(tokens, embeddings=x)).max() > 1e-3

    one = change_fields(MROPE, num_layers=1, final_norm=False, tie_word_embeddings=False, vocab_size=16).make()
    identity = {"kernel": np.eye(16, dtype=np.float32)}

    def layer(i, h):
        layers = jax.tree.map(lambda leaf: leaf[i : i + 1], params["params"]["layers"])
        own = {"layers": layers, "lm_head": identity, "token_embedding": params["params"]["token_embedding"]}
        return one.apply({"params": own}, tokens, embeddings=h)

    h = x
    for i in range(3):
        h = layer(i, h) + (more[i] if i < 2 else 0)
    scale = params["params"]["final_norm"]["scale"]
    normed = h / np.sqrt(np.square(h).mean(axis=-1, keepdims=True) + MROPE.dialect.norm_eps) * scale
    wanted = normed @ params["params"]["token_embedding"]["embedding"].T
    np.testing.assert_allclose(found, wanted, atol=2e-4 * np.abs(wanted).max())


@pytest.mark.parametrize(
    "change,message",
    [
        (dict(mrope_sections=(2, 1)), "three numbers"),
        (dict(mrope_sections=(2, 2, 1)), r"\(2, 2, 1\) of 4 pairs"),
        (dict(positions="learned"), "with learned positions"),
    ],
)
def test_sections_that_do_not_fit_are_refused(change, message):
    with pytest.raises(ConfigError, match=message):
        change_fields(MROPE, **change)
