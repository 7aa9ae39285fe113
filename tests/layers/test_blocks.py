"""Linear maps, norms, rotary positions, feed-forward blocks and the scanned stack, each against its formula."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from mllm_jax.errors import ConfigError
from mllm_jax.layers.linear import Embedding, Linear
from mllm_jax.layers.mlp import ACTIVATIONS, MLP
from mllm_jax.layers.norms import LayerNorm, RMSNorm
from mllm_jax.layers.rotary import (
    RopeScaling,
    apply_rotary,
    grid_angles,
    mrope_parts,
    rotary_angles,
    rotary_frequencies,
)
from mllm_jax.layers.stack import scan_layers


def normal(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def test_linear_contracts_and_adds():
    x, kernel, bias = normal(2, 3, 4, 5), normal(4, 5, 6, 7, seed=1), normal(6, 7, seed=2)
    module = Linear((6, 7), ("heads", "head_dim", "mlp", None), in_ndim=2, use_bias=True)
    y = module.apply({"params": {"kernel": kernel, "bias": bias}}, x)
    np.testing.assert_allclose(y, np.einsum("bsij,ijkl->bskl", x, kernel) + bias, rtol=1e-4, atol=1e-4)


def test_linear_starts_with_the_deviation_asked_for_and_names_its_axes():
    x = jnp.zeros((1, 400))
    boxed = Linear((300,), ("embed", "mlp"), use_bias=True).init(jax.random.key(0), x)["params"]
    assert boxed["kernel"].names == ("embed", "mlp") and boxed["bias"].names == ("mlp",)
    assert float(boxed["kernel"].value.std()) == pytest.approx(1 / 400**0.5, rel=0.02)
    narrow = Linear((300,), ("embed", "mlp"), init_std=0.003).init(jax.random.key(0), x)["params"]
    assert float(narrow["kernel"].value.std()) == pytest.approx(0.003, rel=0.02)


def test_embedding_and_its_transpose():
    table = normal(11, 4)
    module, params = Embedding(11, 4), {"params": {"embedding": table}}
    np.testing.assert_array_equal(module.apply(params, jnp.array([[3, 0]])), table[[[3, 0]]])
    x = normal(2, 4, seed=1)
    np.testing.assert_allclose(module.apply(params, x, method="attend"), x @ table.T, rtol=1e-5, atol=1e-5)


def test_norms():
    x, scale, bias = normal(3, 8) * 5 + 2, normal(8, seed=1), normal(8, seed=2)
    rms = RMSNorm(0.5).apply({"params": {"scale": scale}}, x)
    np.testing.assert_allclose(rms, x / np.sqrt((x**2).mean(-1, keepdims=True) + 0.5) * scale, rtol=1e-5)
    layer = LayerNorm(0.5).apply({"params": {"scale": scale, "bias": bias}}, x)
    wanted = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 0.5) * scale + bias
    np.testing.assert_allclose(layer, wanted, rtol=1e-4, atol=1e-5)
    bare = LayerNorm(0.5, affine=False)
    assert not bare.init(jax.random.key(0), x)
    np.testing.assert_allclose(bare.apply({}, x) * scale + bias, wanted, rtol=1e-4, atol=1e-5)


def test_norms_are_computed_in_float32_and_returned_as_asked():
    x = jnp.full((1, 4), 300.0, jnp.float16)  # its square overflows float16
    out = RMSNorm(dtype=jnp.float16).apply({"params": {"scale": jnp.ones(4)}}, x)
    assert out.dtype == jnp.float16
    np.testing.assert_allclose(np.asarray(out, np.float32), 1.0, atol=1e-3)


def test_rotary_turns_pairs_by_position_times_frequency():
    x, positions, theta = normal(1, 3, 2, 6), np.array([[0, 1, 7]]), 100.0
    out = apply_rotary(jnp.asarray(x), rotary_angles(positions, 6, theta))
    for s, position in enumerate(positions[0]):
        for i in range(3):
            angle = position * theta ** (-2 * i / 6)
            turn = complex(math.cos(angle), math.sin(angle))
            wanted = (x[0, s, :, i] + 1j * x[0, s, :, i + 3]) * turn
            np.testing.assert_allclose(out[0, s, :, i], wanted.real, atol=1e-5)
            np.testing.assert_allclose(out[0, s, :, i + 3], wanted.imag, atol=1e-5)


def test_rotary_of_a_part_in_neighbouring_pairs():
    x, positions, theta = normal(1, 3, 2, 7), np.array([[0, 2, 9]]), 50.0
    angles = rotary_angles(positions, 4, theta)
    out = apply_rotary(jnp.asarray(x), angles, interleaved=True)
    for s, position in enumerate(positions[0]):
        for i in range(2):
            angle = position * theta ** (-2 * i / 4)
            wanted = (x[0, s, :, 2 * i] + 1j * x[0, s, :, 2 * i + 1]) * complex(math.cos(angle), math.sin(angle))
            np.testing.assert_allclose(out[0, s, :, 2 * i], wanted.real, atol=1e-5)
            np.testing.assert_allclose(out[0, s, :, 2 * i + 1], wanted.imag, atol=1e-5)
    np.testing.assert_array_equal(out[..., 4:], x[..., 4:])
    halves = apply_rotary(jnp.asarray(x), angles)
    np.testing.assert_array_equal(halves[..., 4:], x[..., 4:])
    np.testing.assert_array_equal(halves[..., :4], apply_rotary(jnp.asarray(x[..., :4]), angles))


def test_dynamic_frequencies_can_be_traced_and_differ_by_text():
    scaling = RopeScaling("dynamic", 2.0, 16)
    lengths = jnp.array([[5], [16], [40]])
    found = jax.jit(lambda length: rotary_frequencies(8, 100.0, scaling, length))(lengths)
    assert found.shape == (3, 1, 4)
    default = rotary_frequencies(8, 100.0)
    np.testing.assert_allclose(found[:2, 0], jnp.stack([default, default]), rtol=1e-6)
    assert (found[2, 0, 1:] < 0.9 * default[1:]).all()


@pytest.mark.parametrize("arguments", [("longrope", 2.0), ("yarn", 2.0), ("llama3", 2.0, 16, 1.0)])
def test_rotary_scaling_that_lacks_something_is_refused(arguments):
    with pytest.raises(ConfigError, match="longrope|original_max_position_embeddings|high_freq_factor"):
        RopeScaling(*arguments)


def test_rotary_scores_depend_on_distance_only():
    q, k = normal(1, 1, 1, 8), normal(1, 1, 1, 8, seed=1)

    def score(at, distance):
        turned = [
            apply_rotary(jnp.asarray(x), rotary_angles(jnp.array([[p]]), 8, 1e4))
            for x, p in ((q, at + distance), (k, at))
        ]
        return float((turned[0] * turned[1]).sum())

    assert score(0, 5) == pytest.approx(score(40, 5), abs=1e-4)
    assert abs(score(0, 5) - score(0, 6)) > 1e-3


def test_activations():
    x = np.linspace(-3, 3, 13)
    erf = np.array([math.erf(value / 2**0.5) for value in x])
    wanted = {
        "gelu": x * 0.5 * (1 + erf),
        "gelu_tanh": 0.5 * x * (1 + np.tanh((2 / np.pi) ** 0.5 * (x + 0.044715 * x**3))),
        "quick_gelu": x / (1 + np.exp(-1.702 * x)),
        "silu": x / (1 + np.exp(-x)),
        "relu": np.maximum(x, 0),
        "relu_squared": np.maximum(x, 0) ** 2,
        "tanh": np.tanh(x),
    }
    assert set(wanted) == set(ACTIVATIONS)
    for name, values in wanted.items():
        np.testing.assert_allclose(ACTIVATIONS[name](jnp.asarray(x, jnp.float32)), values, atol=1e-6, err_msg=name)


@pytest.mark.parametrize("gated", [False, True])
def test_mlp(gated):
    x = normal(2, 3, 4)
    params = {name: {"kernel": normal(4, 6, seed=i)} for i, name in enumerate(("gate", "up") if gated else ("up",))}
    params["down"] = {"kernel": normal(6, 4, seed=5)}
    first = x @ params["gate" if gated else "up"]["kernel"]
    hidden = first / (1 + np.exp(-first)) * (x @ params["up"]["kernel"] if gated else 1)
    out = MLP(6, "silu", gated, use_bias=False).apply({"params": params}, x)
    np.testing.assert_allclose(out, hidden @ params["down"]["kernel"], rtol=1e-4, atol=1e-4)


class Block(nn.Module):
    """A layer with a parameter, its own input and a broadcast argument."""

    @nn.compact
    def __call__(self, x, own, shared):
        h = jnp.tanh(Linear((4,), ("embed", "mlp"), name="linear")(x)) * own + shared
        return x + h, h.sum()


@pytest.mark.parametrize("remat,unroll", [("none", 1), ("none", 3), ("full", 1), ("dots", 1)])
def test_stack_is_a_loop_over_layers_whatever_the_policy(remat, unroll):
    x, own, shared = map(jnp.asarray, (normal(2, 4), normal(3), normal(4, seed=1)))
    stack = scan_layers(Block, num_layers=3, remat=remat, unroll=unroll, num_broadcast=1)()
    boxed = jax.eval_shape(stack.init, jax.random.key(0), x, own, shared)["params"]
    assert boxed["linear"]["kernel"].names == ("layers", "embed", "mlp")
    assert boxed["linear"]["kernel"].value.shape == (3, 4, 4)
    params = {"linear": {"kernel": jnp.asarray(normal(3, 4, 4, seed=2))}}

    def scanned(params):
        y, outputs = stack.apply({"params": params}, x, own, shared)
        return (y**2).sum(), (y, outputs)

    def looped(params):
        y, outputs = x, []
        for i in range(3):
            layer = jax.tree.map(lambda p, i=i: p[i], params)
            y, out = Block().apply({"params": layer}, y, own[i], shared)
            outputs.append(out)
        return (y**2).sum(), (y, jnp.stack(outputs))

    ours, wanted = (jax.jit(jax.value_and_grad(f, has_aux=True))(params) for f in (scanned, looped))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), ours, wanted)


def test_layers_of_a_stack_start_differently():
    x, own, shared = map(jnp.asarray, (normal(2, 4), normal(2), normal(4, seed=1)))
    stack = scan_layers(Block, num_layers=2, num_broadcast=1)()
    kernel = nn.meta.unbox(jax.jit(stack.init)(jax.random.key(0), x, own, shared))["params"]["linear"]["kernel"]
    assert not np.allclose(kernel[0], kernel[1])


def test_unknown_remat_policy_is_refused():
    with pytest.raises(KeyError, match="sometimes"):
        scan_layers(Block, num_layers=1, remat="sometimes", num_broadcast=1)


def test_norms_name_the_given_axis():
    for norm in (RMSNorm(axis="heads"), LayerNorm(axis="heads")):
        boxed = norm.init(jax.random.key(0), jnp.zeros((1, 4)))["params"]
        assert {box.names for box in boxed.values()} == {("heads",)}


@pytest.mark.parametrize("gated", [False, True])
def test_mlp_with_a_norm_before_its_last_map(gated):
    x = normal(2, 3, 4)
    module = MLP(6, "silu", gated, norm_eps=0.3)
    shapes = nn.meta.unbox(jax.eval_shape(module.init, jax.random.key(0), x))["params"]
    p = jax.tree.map(lambda leaf: normal(*leaf.shape, seed=leaf.size), shapes)
    h = x @ p["gate" if gated else "up"]["kernel"] + p["gate" if gated else "up"]["bias"]
    h = h / (1 + np.exp(-h))
    if gated:
        h = h * (x @ p["up"]["kernel"] + p["up"]["bias"])
    h = (h - h.mean(-1, keepdims=True)) / np.sqrt(h.var(-1, keepdims=True) + 0.3) * p["norm"]["scale"] + p["norm"][
        "bias"
    ]
    wanted = h @ p["down"]["kernel"] + p["down"]["bias"]
    np.testing.assert_allclose(module.apply({"params": p}, x), wanted, rtol=1e-4, atol=1e-4)


def test_grid_angles_turn_half_of_a_head_by_the_row_and_half_by_the_column():
    cos, sin = grid_angles(jnp.array([[3.0, 0.5], [0.0, 0.0]]), 8, 10_000.0)
    angles = np.array([3.0, 3.0 * 0.01, 0.5, 0.5 * 0.01])
    np.testing.assert_allclose(cos[0], np.cos(angles), rtol=1e-6)
    np.testing.assert_allclose(sin[0], np.sin(angles), rtol=1e-6)
    np.testing.assert_array_equal(cos[1], np.ones(4))  # the class token's position is not rotated


@pytest.mark.parametrize("interleaved", [False, True])
def test_three_part_positions_turn_their_own_dimensions(interleaved):
    parts = mrope_parts((4, 2, 2), interleaved)
    assert parts.tolist() == ([0, 1, 2, 0, 1, 2, 0, 0] if interleaved else [0, 0, 0, 0, 1, 1, 2, 2])
    places = jnp.array([[[3, 5, 7], [2, 2, 2]]])
    cos, sin = rotary_angles(places, 16, 100.0, parts=parts)
    for pair, part in enumerate(parts):
        plain = rotary_angles(places[..., part], 16, 100.0)
        np.testing.assert_allclose(cos[..., pair], plain[0][..., pair], rtol=1e-6)
        np.testing.assert_allclose(sin[..., pair], plain[1][..., pair], rtol=1e-6)
