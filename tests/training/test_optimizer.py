"""The learning rate of single parts, and the moving average."""

from __future__ import annotations

from dataclasses import replace

import jax
import numpy as np
import pytest

from mllm_jax.errors import ConfigError
from mllm_jax.training.average import averaged
from mllm_jax.training.config import AdamW
from mllm_jax.training.optimizer import make_optimizer

STEPS = 6
CONFIG = AdamW(learning_rate=1e-2, warmup_steps=2, weight_decay=0.3, clip_norm=0.5)
PARAMS = {
    "encoder_image": {"layer": {"kernel": np.linspace(-1, 1, 6).reshape(2, 3), "bias": np.ones(3)}},
    "llm": {"kernel": np.linspace(1, 2, 4).reshape(2, 2)},
}


def moved(config: AdamW):
    optimizer, params = make_optimizer(config, STEPS), PARAMS
    state = optimizer.init(params)
    for step in range(STEPS):
        gradients = jax.tree.map(lambda x, step=step: np.cos(step + x), PARAMS)  # independent of the parameters
        updates, state = optimizer.update(gradients, state, params)
        params = jax.tree.map(np.add, params, updates)
    return params


def test_a_part_with_a_factor_moves_as_with_that_learning_rate():
    """Checks that decay is included, and that the gradients of all parts are clipped together, as without factors."""
    slow = replace(CONFIG, learning_rate=CONFIG.learning_rate * 0.2)
    both = moved(replace(CONFIG, factors=(("encoder_image/*", 0.2), ("*", 1.0))))
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), both["encoder_image"], moved(slow)["encoder_image"]
    )
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), both["llm"], moved(CONFIG)["llm"])
    assert np.abs(moved(slow)["llm"]["kernel"] - both["llm"]["kernel"]).max() > 1e-3


def test_a_pattern_that_matches_nothing_is_refused():
    with pytest.raises(ConfigError, match="'tower/\\*' matches nothing.*\n.*encoder"):
        moved(replace(CONFIG, factors=(("tower/*", 0.2),)))


def test_the_moving_average():
    """Checks the average against a loop in float64, and that it changes no update; without it, the last parameters."""
    optimizer, plain = make_optimizer(CONFIG, STEPS, ema=0.3), make_optimizer(CONFIG, STEPS)
    params = same = jax.tree.map(np.float32, PARAMS)
    average = jax.tree.map(np.float64, PARAMS)
    state, other = optimizer.init(params), plain.init(same)
    for step in range(STEPS):
        gradients = jax.tree.map(lambda x, step=step: np.cos(step + x), PARAMS)
        updates, state = optimizer.update(gradients, state, params)
        params = jax.tree.map(np.add, params, updates)
        updates, other = plain.update(gradients, other, same)
        same = jax.tree.map(np.add, same, updates)
        kept = min(0.3, (1 + step) / (10 + step))
        average = jax.tree.map(lambda old, new, kept=kept: kept * old + (1 - kept) * np.float64(new), average, params)
    assert 0.1 < (1 + 1) / (10 + 1) < 0.3 < (1 + 4) / (10 + 4), "both cases come"
    jax.tree.map(np.testing.assert_array_equal, params, same)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), averaged(params, state), average)
    assert averaged(same, other) is same
    assert np.abs(average["llm"]["kernel"] - params["llm"]["kernel"]).max() > 1e-4
