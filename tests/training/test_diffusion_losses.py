"""Losses of output projectors and generators against values made by hand in float64."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mllm_jax.errors import ConfigError
from mllm_jax.training.objectives.alignment_losses import condition_loss
from mllm_jax.training.objectives.diffusion_losses import (
    diffusion_loss,
    drop_condition,
    min_snr_weights,
    signal_to_noise,
)

RNG = np.random.default_rng(0)


# ---- alignment


@pytest.mark.parametrize("masked", [False, True])
def test_condition_loss_and_its_gradient(masked):
    predicted, target = RNG.normal(size=(2, 3, 5)), RNG.normal(size=(2, 3, 5))
    mask = np.array([[True, False, True], [False, False, True]]) if masked else None
    counted = np.ones((2, 3), bool) if mask is None else mask
    difference, given = (predicted - target)[counted], predicted.copy()
    if masked:
        given[~mask] = np.nan  # padding may be anything
    length = np.sqrt((difference**2).sum(-1))
    wanted = {
        "l2": (length.mean(), difference / length[:, None] / len(length)),
        "mse": ((difference**2).mean(), 2 * difference / difference.size),
    }
    for kind, (value, gradient) in wanted.items():
        ours, slope = jax.value_and_grad(condition_loss)(jnp.asarray(given, jnp.float32), target, kind, mask)
        np.testing.assert_allclose(ours, value, rtol=1e-6)
        np.testing.assert_allclose(slope[counted], gradient, rtol=1e-5, atol=1e-7)
        assert not np.asarray(slope)[~counted].any()


def test_equal_conditions_have_loss_and_gradient_zero():
    """Checks what is NaN in the reference; bfloat16 is computed in float32."""
    same = jnp.ones((2, 3, 4), jnp.bfloat16)
    for kind in ("l2", "mse"):
        value, slope = jax.value_and_grad(condition_loss)(same, same, kind)
        assert value == 0 and value.dtype == jnp.float32 and not slope.astype(jnp.float32).any()
    assert condition_loss(same, same + 1, mask=jnp.zeros((2, 3), bool)) == 0
    with pytest.raises(ConfigError, match="condition loss 'cosine'"):
        condition_loss(same, same, "cosine")


# ---- diffusion


def test_min_snr_weights():
    snr = np.array([1e-3, 0.5, 5.0, 20.0, 4e4])
    wanted = {
        "epsilon": np.minimum(snr, 5) / snr,
        "v_prediction": np.minimum(snr, 5) / (snr + 1),
        "sample": np.minimum(snr, 5),
    }
    for prediction, weights in wanted.items():
        np.testing.assert_allclose(min_snr_weights(jnp.asarray(snr), 5.0, prediction), weights, rtol=1e-5)
    ends = jnp.array([0.0, jnp.inf])  # zero terminal SNR, and a clean sample
    for prediction, weights in (("epsilon", [1, 0]), ("v_prediction", [0, 0]), ("sample", [0, 5])):
        np.testing.assert_array_equal(min_snr_weights(ends, 5.0, prediction), weights)
    for prediction, gamma in (("flow_prediction", 5.0), ("epsilon", 0.0)):
        with pytest.raises(ConfigError, match=f"min-SNR weights with gamma {gamma} .* '{prediction}'"):
            min_snr_weights(ends, gamma, prediction)
    alphas = np.cumprod(1 - np.linspace(0.1, 0.9, 4))
    snr = signal_to_noise(jnp.asarray(alphas), jnp.array([3, 0]))
    np.testing.assert_allclose(snr, (alphas / (1 - alphas))[[3, 0]], rtol=1e-5)


def test_diffusion_loss():
    output, target, weights = RNG.normal(size=(3, 2, 4, 5)), RNG.normal(size=(3, 2, 4, 5)), np.array([0.2, 3.0, 1.0])
    each = ((output - target) ** 2).mean((1, 2, 3))
    np.testing.assert_allclose(diffusion_loss(jnp.asarray(output), target), each.mean(), rtol=1e-6)
    np.testing.assert_allclose(diffusion_loss(output, target, weights), (each * weights).mean(), rtol=1e-6)
    assert abs((each * weights).mean() - each.mean() * weights.mean()) > 0.05
    rows, broken = np.array([True, False, True]), output.copy()
    broken[1] = np.nan
    weighted = diffusion_loss(broken, target, np.array([0.2, np.nan, 1.0]), rows)
    np.testing.assert_allclose(weighted, (each * weights)[rows].mean(), rtol=1e-6)
    parts = RNG.random((3, 2, 4)) < 0.5
    parts[1] = False
    inside = [((output - target) ** 2)[i][parts[i]].mean() * weights[i] for i in (0, 2)]
    np.testing.assert_allclose(diffusion_loss(output, target, weights, parts), np.mean(inside), rtol=1e-6)
    assert diffusion_loss(output, target, weights, np.zeros(3, bool)) == 0
    slope = jax.grad(diffusion_loss)(jnp.asarray(broken, jnp.float32), target, weights, rows)
    assert np.isfinite(slope).all() and not slope[1].any()


def test_conditions_are_dropped_as_a_whole():
    rows = 4000
    condition = (np.ones((rows, 2, 3), np.float32), np.ones((rows, 4), np.float32))
    empty = (np.full((2, 3), 7, np.float32), np.full((1, 4), 9, np.float32))
    first, second = jax.jit(lambda key: drop_condition(key, condition, empty, 0.1))(jax.random.key(0))
    dropped = np.asarray(first)[:, 0, 0] == 7
    assert 0.08 < dropped.mean() < 0.12
    np.testing.assert_array_equal(first, np.where(dropped[:, None, None], empty[0], condition[0]))
    np.testing.assert_array_equal(second, np.where(dropped[:, None], empty[1], condition[1]))
    again, other = (drop_condition(jax.random.key(k), condition[1], empty[1], 0.1) for k in (0, 1))
    np.testing.assert_array_equal(again, second)
    assert (np.asarray(other) != np.asarray(second)).any()
    np.testing.assert_array_equal(drop_condition(jax.random.key(0), condition[0], empty[0], 0.0), condition[0])
    assert (np.asarray(drop_condition(jax.random.key(0), condition[0], empty[0], 1.0)) == 7).all()
    with pytest.raises(ConfigError, match="at the rate 1.5"):
        drop_condition(jax.random.key(0), condition[0], empty[0], 1.5)
