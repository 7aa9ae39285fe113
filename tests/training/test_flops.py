"""Counted operations against counts by hand."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import pytest
from flax import linen as nn

from mllm_jax.training.flops import PartFlops, count_flops, flops_by_part

X, W = jnp.ones((5, 7)), jnp.ones((7, 11))
MATMUL = 2 * 5 * 7 * 11


def test_matrix_products_with_batch_and_several_contracted_axes():
    assert count_flops(jnp.matmul, X, W) == MATMUL
    a, b = jnp.ones((3, 5, 7, 2)), jnp.ones((3, 7, 2, 11))
    assert count_flops(lambda a, b: jnp.einsum("bijk,bjkn->bin", a, b), a, b) == 2 * 3 * 5 * 7 * 2 * 11


def test_elementwise_work_is_left_out():
    assert count_flops(lambda x: jnp.tanh(x) * 2 + x.sum(), X) == 0


def test_a_scan_counts_its_turns():
    square = jnp.ones((6, 9, 9))

    def run(x, kernels):
        return jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, kernels)[0]

    assert count_flops(run, jnp.ones((4, 9)), square) == 6 * 2 * 4 * 9 * 9
    # The first layer's input needs no gradient, but a scan is one program for all its iterations.
    gradient = jax.grad(lambda kernels: run(jnp.ones((4, 9)), kernels).sum())
    assert count_flops(gradient, square) == 3 * 6 * 2 * 4 * 9 * 9


def test_nested_calls_and_rematerialisation():
    inner = jax.jit(lambda x: x @ W)
    assert count_flops(lambda x: inner(jnp.tanh(x)).sum(), X) == MATMUL
    plain = jax.grad(lambda w: jnp.tanh(X @ w).sum())
    again = jax.grad(lambda w: jax.checkpoint(lambda w: jnp.tanh(X @ w))(w).sum())
    assert count_flops(plain, W) == 2 * MATMUL
    assert count_flops(again, W) == 3 * MATMUL, "what is computed again is computed"


def test_a_condition_counts_its_dearest_branch():
    def run(x):
        return jax.lax.cond(x[0, 0] > 0, lambda x: (x @ W).sum(), lambda x: x.sum(), x)

    assert count_flops(run, X) == MATMUL


def test_a_frozen_part_is_not_counted_backwards():
    """Checks x -> A -> B, with hidden sizes 7, 11, 3."""
    params = {"a": W, "b": jnp.ones((11, 3))}
    first, second = MATMUL, 2 * 5 * 11 * 3

    def loss(trainable, frozen):
        p = trainable | frozen
        return jnp.square(jnp.tanh(X @ p["a"]) @ p["b"]).sum()

    def step(*names):
        trainable = {n: params[n] for n in names}
        frozen = {n: p for n, p in params.items() if n not in names}
        return count_flops(jax.grad(loss), trainable, frozen)

    assert step("a", "b") == 2 * first + 3 * second  # no gradient of the data X
    assert step("a") == 2 * first + 2 * second  # the gradient passes through B, B has none
    assert step("b") == first + 2 * second  # A runs forwards only


def test_convolution_and_its_gradients():
    images, kernel = jnp.ones((2, 8, 8, 3)), jnp.ones((3, 3, 3, 5))

    def conv(images, kernel, stride=2):
        return jax.lax.conv_general_dilated(
            images, kernel, (stride, stride), ((1, 1), (1, 1)), dimension_numbers=("NHWC", "HWIO", "NHWC")
        )

    forward = 2 * (2 * 4 * 4 * 5) * (3 * 3 * 3)
    assert count_flops(conv, images, kernel) == forward
    assert count_flops(lambda i, k: conv(i, k, 1), images, kernel) == 4 * forward
    both = jax.grad(lambda i, k: jnp.square(conv(i, k)).sum(), argnums=(0, 1))
    assert count_flops(both, images, kernel) == 3 * forward
    only_kernel = jax.grad(lambda i, k: jnp.square(conv(i, k)).sum(), argnums=1)
    assert count_flops(only_kernel, images, kernel) == 2 * forward


@pytest.mark.parametrize("groups", [1, 2, 4])
def test_grouped_convolution(groups):
    images, kernel = jnp.ones((1, 6, 6, 4)), jnp.ones((3, 3, 4 // groups, 8))

    def conv(images, kernel):
        return jax.lax.conv_general_dilated(
            images, kernel, (1, 1), "VALID", dimension_numbers=("NHWC", "HWIO", "NHWC"), feature_group_count=groups
        )

    assert count_flops(conv, images, kernel) == 2 * (4 * 4 * 8) * (3 * 3 * 4 // groups)


class Two(nn.Module):
    """An encoder and a language model with a head, of one product each."""

    @nn.compact
    def __call__(self, x):
        x = nn.Dense(4, use_bias=False, name="encoder")(x)
        return nn.Dense(8, use_bias=False, name="lm_head")(nn.Dense(4, use_bias=False, name="llm")(x))


def test_parts_are_told_apart_forward_and_backward():
    x = jnp.ones((3, 4))
    params = Two().init(jax.random.key(0), x)["params"]
    frozen = {"encoder": params.pop("encoder")}

    def loss(params):
        return Two().apply({"params": params | frozen}, x).sum()

    one, head = 2 * 3 * 4 * 4, 2 * 3 * 4 * 8
    assert flops_by_part(jax.value_and_grad(loss), ("encoder", "llm", "lm_head"), params) == {
        "encoder": PartFlops(one, 0),
        "llm": PartFlops(one, one),  # no trained part is before it
        "lm_head": PartFlops(head, 2 * head),
    }
