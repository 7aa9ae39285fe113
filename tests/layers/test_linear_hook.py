"""The hook of `Linear`: its arguments, the composition of several hooks, and its own leaves beside the kernel."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax.traverse_util import flatten_dict, unflatten_dict

from mllm_jax import DecoderConfig
from mllm_jax.layers.linear import Linear, contract, linear_hook

HEADS = Linear((2, 3), ("embed", "heads", "head_dim"), use_bias=True)
X = jnp.asarray(np.random.default_rng(0).normal(size=(4, 5)), jnp.float32)
RANK = 2
DECODER = DecoderConfig(vocab_size=32, hidden_size=16, num_layers=3, num_heads=4, num_kv_heads=2, mlp_size=24)
TOKENS = jnp.arange(12, dtype=jnp.int32).reshape(2, 6)


@pytest.fixture(scope="module")
def params():
    rng = np.random.default_rng(1)
    shapes = {"kernel": (5, 2, 3), "bias": (2, 3)}
    return {name: jnp.asarray(rng.normal(size=shape), jnp.float32) for name, shape in shapes.items()}


def low_rank(linear, x, kernel, product):
    """Returns x W + x A B, with A and B beside the kernel, as LoRA does."""
    inputs, init = linear.in_ndim, nn.initializers.normal(0.1)
    a_init = nn.with_logical_partitioning(init, (*linear.names[:inputs], None))
    b_init = nn.with_logical_partitioning(nn.initializers.zeros, (None, *linear.names[inputs:]))
    a = linear.param("lora_a", a_init, (*kernel.shape[:inputs], RANK), jnp.float32).astype(linear.dtype)
    b = linear.param("lora_b", b_init, (RANK, *linear.features), jnp.float32).astype(linear.dtype)
    return product(x) + contract(contract(x.astype(linear.dtype), a, inputs), b)


def apply(params, *hooks):
    if not hooks:
        return HEADS.apply({"params": params}, X)
    with linear_hook(hooks[0]):
        return apply(params, *hooks[1:])


def test_without_a_hook_it_is_a_product_and_a_bias(params):
    expected = np.einsum("be,enh->bnh", X, params["kernel"]) + params["bias"]
    np.testing.assert_allclose(apply(params), expected, rtol=1e-5, atol=1e-6)


def test_a_hook_takes_the_place_of_the_product(params):
    seen = []

    def doubled(linear, x, kernel, product):
        seen.append((type(linear), linear.names, x.shape, kernel.shape))
        return 2 * product(x)

    found = apply(params, doubled)
    assert seen == [(Linear, HEADS.names, (4, 5), (5, 2, 3))]
    np.testing.assert_allclose(found - params["bias"], 2 * (apply(params) - params["bias"]), rtol=1e-4, atol=1e-5)


def test_what_was_entered_first_is_called_first(params):
    def times(linear, x, kernel, product):
        return 10 * product(x)

    def plus(linear, x, kernel, product):
        return product(x) + 1

    plain = apply(params) - params["bias"]
    for hooks, expected in (((times, plus), 10 * (plain + 1)), ((plus, times), 10 * plain + 1)):
        np.testing.assert_allclose(apply(params, *hooks) - params["bias"], expected, rtol=1e-4, atol=1e-4)


def test_it_ends_with_the_block_even_by_an_exception(params):
    def failing(linear, x, kernel, product):
        raise RuntimeError("mine")

    with pytest.raises(RuntimeError, match="mine"):
        apply(params, failing)
    assert apply(params).shape == (4, 2, 3)


def test_leaves_of_its_own_carry_the_kernels_axis_names(params):
    with linear_hook(low_rank):
        boxed = HEADS.init(jax.random.key(0), X)["params"]
    assert boxed["kernel"].names == ("embed", "heads", "head_dim")
    assert boxed["lora_a"].names == ("embed", None) and boxed["lora_a"].value.shape == (5, RANK)
    assert boxed["lora_b"].names == (None, "heads", "head_dim") and boxed["lora_b"].value.shape == (RANK, 2, 3)
    extra = nn.meta.unbox({name: boxed[name] for name in ("lora_a", "lora_b")})
    np.testing.assert_array_equal(apply(params | extra, low_rank), apply(params))  # B is zero
    extra["lora_b"] = extra["lora_b"] + 0.5
    merged = params["kernel"] + jnp.einsum("er,rnh->enh", extra["lora_a"], extra["lora_b"])
    np.testing.assert_allclose(apply(params | extra, low_rank), apply(params | {"kernel": merged}), atol=1e-5)


def test_in_scanned_layers_each_has_its_own_and_frozen_kernels_have_no_gradient():
    module = DECODER.make()
    with linear_hook(low_rank):
        abstract = jax.eval_shape(module.init, jax.random.key(0), TOKENS)["params"]
    plain = jax.eval_shape(module.init, jax.random.key(0), TOKENS)["params"]
    assert abstract["layers"]["attention"]["q"]["lora_a"].names == ("layers", "embed", None)
    leaves, before = flatten_dict(nn.meta.unbox(abstract), sep="/"), flatten_dict(nn.meta.unbox(plain), sep="/")
    kernels = {path.removesuffix("kernel") for path in before if path.endswith("/kernel")}
    assert set(leaves) == set(before) | {path + name for path in kernels for name in ("lora_a", "lora_b")}
    assert {leaf.shape[0] for path, leaf in leaves.items() if path.startswith("layers/")} == {3}
    rng = np.random.default_rng(0)
    random = {path: jnp.asarray(rng.normal(0, 0.3, leaf.shape), jnp.float32) for path, leaf in leaves.items()}
    trained = {path: leaf for path, leaf in random.items() if "lora_" in path}

    def loss(trained):
        tree = unflatten_dict(random | trained, sep="/")
        with linear_hook(low_rank):
            return jnp.square(module.apply({"params": tree}, TOKENS)).mean()

    gradient = jax.jit(jax.grad(loss))(trained)
    assert all(bool((jnp.abs(leaf).max(axis=tuple(range(1, leaf.ndim))) > 0).all()) for leaf in gradient.values())
