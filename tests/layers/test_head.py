"""The loss of an output head in chunks equals that of whole logits, with its gradients, on one device and on eight."""

from __future__ import annotations

from contextlib import nullcontext

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mllm_jax.layers.head import HeadInputs, head_cross_entropy, logits_bytes
from mllm_jax.sharding.logical import use_mesh
from mllm_jax.sharding.mesh import MeshConfig, make_mesh
from mllm_jax.training.objectives.next_token import cross_entropy

ROWS, LENGTH, WIDTH, VOCAB, Z_LOSS = 8, 7, 16, 30, 0.2


@pytest.fixture(scope="module")
def case():
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.normal(size=(ROWS, LENGTH, WIDTH)), jnp.float32)
    matrix = jnp.asarray(rng.normal(size=(WIDTH, VOCAB)), jnp.float32)
    targets = jnp.asarray(rng.integers(0, VOCAB, (ROWS, LENGTH)), jnp.int32)
    weights = jnp.asarray(rng.integers(0, 3, (ROWS, LENGTH)), jnp.float32)
    return x, matrix, targets, weights


def whole(x, matrix, targets, weights, tied):
    nll, log_z, right = cross_entropy(HeadInputs(x, matrix, tied).logits(), targets)
    return (weights * (nll + Z_LOSS * log_z**2)).sum(), (weights * right).sum()


MESHES = {
    "one": None,
    "fsdp8": MeshConfig(data=1, fsdp=8),
    "data2_fsdp2_tensor2": MeshConfig(data=2, fsdp=2, tensor=2),
    "data2_fsdp4": MeshConfig(data=2, fsdp=4),
}


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("mesh", MESHES)
def test_chunks_equal_the_whole(mesh, tied, case):
    """Checks 56 positions in 3 chunks of 19, and on eight devices 7 in 3 of 3: the last is never full."""
    x, matrix, targets, weights = case
    matrix = matrix.T if tied else matrix

    def chunked(x, matrix):
        with use_mesh(make_mesh(MESHES[mesh])) if MESHES[mesh] else nullcontext():
            scores = head_cross_entropy(HeadInputs(x, matrix, tied), targets, weights, Z_LOSS, 3)
            return 0.5 * scores.loss, scores.right

    (loss, right), found = jax.jit(jax.value_and_grad(chunked, (0, 1), has_aux=True))(x, matrix)
    (wanted, wanted_right), gradients = jax.value_and_grad(lambda *a: whole(*a, targets, weights, tied), (0, 1), True)(
        x, matrix
    )
    np.testing.assert_allclose(loss, 0.5 * wanted, rtol=1e-5)
    assert float(right) == float(wanted_right)
    for one, other in zip(found, gradients, strict=True):
        np.testing.assert_allclose(one, 0.5 * other, rtol=1e-4, atol=1e-5)
    assert float(jax.jit(chunked)(x, matrix)[0]) == pytest.approx(float(loss), rel=1e-6), "without a gradient"


def test_positions_without_loss_cost_nothing(case):
    """Checks that the other positions are not read if 14 of 56 carry loss, which is one chunk of four."""
    x, matrix, targets, _ = case
    weights = jnp.where(jnp.arange(ROWS * LENGTH).reshape(ROWS, LENGTH) % 4 == 1, 2.0, 0.0)
    spoilt = jnp.where(weights[..., None] > 0, x, jnp.nan)

    def chunked(x, matrix):
        return head_cross_entropy(HeadInputs(x, matrix), targets, weights, Z_LOSS, 4).loss

    loss, (dx, slope) = jax.jit(jax.value_and_grad(chunked, (0, 1)))(spoilt, matrix)
    wanted, gradients = jax.value_and_grad(lambda *a: whole(*a, targets, weights, False)[0], (0, 1))(x, matrix)
    np.testing.assert_allclose(loss, wanted, rtol=1e-5)
    np.testing.assert_allclose(dx, gradients[0], rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(slope, gradients[1], rtol=1e-4, atol=1e-5)


def test_a_frozen_head_costs_no_gradient_of_its_matrix(case):
    x, matrix, targets, weights = case

    def loss(x, matrix):
        return head_cross_entropy(HeadInputs(x, matrix), targets, weights, 0.0, 2).loss

    def products(argument):
        return str(jax.make_jaxpr(jax.grad(loss, argument))(x, matrix)).count("dot_general")

    assert products((0, 1)) == products(0) + 1 == products(1) + 1


def test_bytes_of_logits_are_those_of_one_device(case):
    head = HeadInputs(case[0], jnp.zeros((WIDTH, 32)))
    assert logits_bytes(head) == 4 * ROWS * LENGTH * 32
    with use_mesh(make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))):
        assert logits_bytes(head) == 4 * ROWS * LENGTH * 32 // 8
