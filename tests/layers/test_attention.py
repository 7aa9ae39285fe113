"""Attention against a loop over queries in numpy: grouped keys, causal order, windows, segments, a cache."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from mllm_jax.layers.attention import Attention, attention


def by_loops(q, k, v, *, mask, q_segments=None, k_segments=None, q_index=None, window=None):
    """Computes attention by its definition, one query and one head at a time, in float64."""
    rows, queries, heads, size = q.shape
    group = heads // k.shape[2]
    out = np.zeros(q.shape)
    for b in range(rows):
        for s in range(queries):
            place = s if q_index is None else q_index[b, s]
            seen = [
                t
                for t in range(k.shape[1])
                if (mask == "full" or t <= place)
                and (window is None or place - window < t)
                and (q_segments is None or q_segments[b, s] == k_segments[b, t])
            ]
            for n in range(heads):
                scores = np.array([q[b, s, n] @ k[b, t, n // group] for t in seen]) / size**0.5
                weights = np.exp(scores - scores.max())
                out[b, s, n] = (weights / weights.sum()) @ np.array([v[b, t, n // group] for t in seen])
    return out


def random_qkv(queries=6, keys=6, heads=4, kv_heads=2, size=5):
    rng = np.random.default_rng(0)
    return (
        rng.normal(size=(2, queries, heads, size)).astype(np.float32),
        rng.normal(size=(2, keys, kv_heads, size)).astype(np.float32),
        rng.normal(size=(2, keys, kv_heads, size)).astype(np.float32),
    )


SEGMENTS = np.array([[1, 1, 2, 2, 2, 0], [1, 2, 2, 3, 3, 3]])
INDEX = np.array([[2, 3, 4], [1, 2, 5]])


@pytest.mark.parametrize(
    "kind",
    [
        dict(mask="full"),
        dict(mask="causal"),
        dict(mask="full", q_segments=SEGMENTS, k_segments=SEGMENTS),
        dict(mask="causal", q_segments=SEGMENTS, k_segments=SEGMENTS),
        dict(mask="causal", q_index=INDEX),
        dict(mask="causal", q_index=INDEX, q_segments=np.take_along_axis(SEGMENTS, INDEX, 1), k_segments=SEGMENTS),
        dict(mask="causal", window=1),
        dict(mask="causal", window=jnp.int32(3)),
        dict(mask="causal", window=2, q_segments=SEGMENTS, k_segments=SEGMENTS),
        dict(mask="causal", window=2, q_index=INDEX),
    ],
    ids=["full", "causal", "segments", "packed", "cache", "packed cache", "itself", "window", "packed w.", "cached w."],
)
@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_equals_the_definition(kind, kv_heads):
    q, k, v = random_qkv(queries=3 if "q_index" in kind else 6, kv_heads=kv_heads)
    np.testing.assert_allclose(attention(q, k, v, **kind), by_loops(q, k, v, **kind), atol=2e-6)


def test_a_query_that_sees_nothing_is_finite_and_so_is_its_gradient():
    q, k, v = map(jnp.asarray, random_qkv())
    segments = jnp.asarray(SEGMENTS)

    def total(q, k, v):
        return attention(q, k, v, q_segments=segments * 0 + 9, k_segments=segments).sum()

    out = attention(q, k, v, q_segments=segments * 0 + 9, k_segments=segments)
    mean = np.repeat(np.asarray(v).mean(axis=1, keepdims=True), 2, axis=2)
    np.testing.assert_allclose(out, np.broadcast_to(mean, out.shape), atol=1e-6)
    assert all(np.isfinite(g).all() for g in jax.grad(total, argnums=(0, 1, 2))(q, k, v))


def test_softmax_is_float32_when_inputs_are_bfloat16():
    """Checks 4096 equal scores: bf16 weights would not sum to 1; float32 gives the mean of the values."""
    q = jnp.zeros((1, 1, 1, 2), jnp.bfloat16)
    k = jnp.zeros((1, 4096, 1, 2), jnp.bfloat16)
    v = jnp.ones((1, 4096, 1, 2), jnp.bfloat16)
    out = attention(q, k, v)
    assert out.dtype == jnp.bfloat16
    np.testing.assert_allclose(np.asarray(out, np.float32), 1.0, atol=1e-2)


def kernels(width=96, heads=4, kv_heads=2, head_dim=32, seed=0, **change) -> dict:
    """Returns the four initial kernels of an attention layer, with keys and values repeated for shared heads."""
    module = Attention(heads, kv_heads, head_dim, **change)
    params = nn.meta.unbox(jax.jit(module.init)(jax.random.key(seed), jnp.zeros((1, 3, width))))["params"]
    found = {name: np.asarray(params[name]["kernel"], np.float64) for name in ("q", "k", "v", "out")}
    repeated = {name: np.repeat(found[name], heads // kv_heads, axis=1) for name in ("k", "v")}
    return found | repeated


def products(found: dict) -> dict[str, list[np.ndarray]]:
    """Returns W_q W_k^T and W_v W_o of each head."""
    heads = range(found["q"].shape[1])
    return {
        "qk": [found["q"][:, n] @ found["k"][:, n].T for n in heads],
        "vo": [found["v"][:, n] @ found["out"][n] for n in heads],
    }


def test_mimetic_products_are_near_multiples_of_the_identity():
    """Checks that the mean of the diagonal is the multiple; the rest is the noise of 32 random directions."""
    for name, multiple in (("qk", 0.8), ("vo", 0.3)):
        for product in products(kernels(mimetic_init=True))[name]:
            beside = product[~np.eye(96, dtype=bool)]
            assert np.diag(product).mean() == pytest.approx(multiple * 32 / 96, rel=0.15)
            assert abs(beside.mean()) < 0.01 * multiple
            assert np.diag(product).mean() > 4 * beside.std()


def test_mimetic_products_are_off_by_default():
    for group in products(kernels()).values():
        for product in group:
            assert abs(np.diag(product).mean()) < 0.5 * product[~np.eye(96, dtype=bool)].std()


def test_a_mimetic_layer_has_the_same_parameters_and_the_seed_decides():
    for kv_heads in (1, 2, 4):
        x = jnp.zeros((1, 3, 96))
        shapes = [
            jax.eval_shape(Attention(4, kv_heads, 32, mimetic_init=flag).init, jax.random.key(0), x)
            for flag in (False, True)
        ]
        assert jax.tree.map(lambda x: (x.shape, x.dtype), shapes[0]) == jax.tree.map(
            lambda x: (x.shape, x.dtype), shapes[1]
        )
        assert jax.tree.structure(shapes[0]) == jax.tree.structure(shapes[1]), "and the same logical axes"
    one, again, other = (kernels(mimetic_init=True, seed=seed) for seed in (0, 0, 1))
    for name in one:
        np.testing.assert_array_equal(one[name], again[name])
        assert np.abs(one[name] - other[name]).max() > 0.1


def test_unknown_mask_is_refused():
    q, k, v = random_qkv()
    with pytest.raises(ValueError, match="sideways.*causal"):
        attention(q, k, v, mask="sideways")
    with pytest.raises(ValueError, match="'full' with a sliding window.*causal"):
        attention(q, k, v, mask="full", window=3)


def test_norm_of_queries_and_keys_over_all_heads_and_norm_of_what_the_heads_give():
    """Checks that each norm is over the whole width: halving one head's numbers changes the other heads."""
    x = jnp.asarray(np.random.default_rng(0).normal(size=(1, 5, 8)), jnp.float32)
    plain = Attention(2, qkv_bias=False)
    module = Attention(2, qkv_bias=False, qk_norm=True, qk_norm_width=True, out_norm_eps=0.2, norm_eps=0.1)
    params = nn.meta.unbox(module.init(jax.random.key(0), x))["params"]
    assert params["q_norm"]["scale"].shape == params["norm"]["bias"].shape == (8,)
    rng = np.random.default_rng(1)
    params = jax.tree.map(lambda leaf: jnp.asarray(rng.normal(size=leaf.shape), jnp.float32), params)
    q, k, v = (jnp.einsum("bse,enh->bsnh", x, params[part]["kernel"]) for part in "qkv")

    def rms(y, scale):
        flat = y.reshape(1, 5, 8)
        return (flat / jnp.sqrt((flat**2).mean(-1, keepdims=True) + 0.1) * scale).reshape(y.shape)

    y = attention(rms(q, params["q_norm"]["scale"]), rms(k, params["k_norm"]["scale"]), v).reshape(1, 5, 8)
    y = (y - y.mean(-1, keepdims=True)) / jnp.sqrt(y.var(-1, keepdims=True) + 0.2)
    y = y * params["norm"]["scale"] + params["norm"]["bias"]
    wanted = y @ params["out"]["kernel"].reshape(8, 8) + params["out"]["bias"]
    np.testing.assert_allclose(module.apply({"params": params}, x)[0], wanted, rtol=1e-4, atol=1e-4)
    assert set(nn.meta.unbox(plain.init(jax.random.key(0), x))["params"]) == {"q", "k", "v", "out"}


def test_keys_may_lack_the_bias_that_queries_and_values_have():
    shapes = jax.eval_shape(Attention(2, k_bias=False).init, jax.random.key(0), jnp.zeros((1, 3, 4)))["params"]
    assert [part for part in "qkv" if "bias" in shapes[part]] == ["q", "v"]
