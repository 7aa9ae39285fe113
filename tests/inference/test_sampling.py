"""The choice of the next token against the same filters in numpy."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mllm_jax.errors import ConfigError
from mllm_jax.inference.sampling import Sampling, choose

LOGITS = np.random.default_rng(0).normal(size=12).astype(np.float32) * 2


def distribution(logits, s: Sampling) -> np.ndarray:
    """Probabilities after temperature, top_k and top_p, by sorting."""
    x = logits.astype(np.float64) / s.temperature
    order = np.argsort(-x)
    if s.top_k:
        order = order[: s.top_k]
    p = np.exp(x[order] - x.max())
    p /= p.sum()
    kept = np.concatenate([[0.0], np.cumsum(p)[:-1]]) < s.top_p
    out = np.zeros(len(x))
    out[order[kept]] = p[kept] / p[kept].sum()
    return out


@pytest.mark.parametrize(
    "sampling",
    [
        Sampling(temperature=1.0),
        Sampling(temperature=0.5),
        Sampling(temperature=1.5, top_k=3),
        Sampling(temperature=1.0, top_p=0.7),
        Sampling(temperature=2.0, top_k=6, top_p=0.6),
        Sampling(temperature=1.0, top_k=99),
        Sampling(temperature=1.0, top_p=1e-6),
    ],
    ids=str,
)
def test_frequencies(sampling):
    """20,000 draws: nothing outside the kept tokens, and each kept token as often as it should come."""
    draws = 20_000
    rows = jnp.broadcast_to(jnp.asarray(LOGITS), (draws, 12))
    drawn = np.asarray(jax.jit(choose, static_argnums=2)(rows, jax.random.key(1), sampling))
    assert drawn.dtype == np.int32
    found = np.bincount(drawn, minlength=12) / draws
    wanted = distribution(LOGITS, sampling)
    assert (found[wanted == 0] == 0).all()
    np.testing.assert_allclose(found, wanted, atol=5 * 0.5 / draws**0.5)


def test_rows_are_filtered_each_by_itself():
    logits = jnp.asarray(np.stack([LOGITS, LOGITS[::-1]]))
    sampling = Sampling(temperature=1.0, top_k=2)
    drawn = np.array([choose(logits, jax.random.key(i), sampling) for i in range(20)])
    best = np.argsort(-LOGITS)[:2]
    assert set(drawn[:, 0]) == set(best) and set(drawn[:, 1]) == set(11 - best)


def test_greedy_takes_the_largest_and_no_key():
    logits = jnp.asarray(np.random.default_rng(1).normal(size=(5, 12)))
    drawn = choose(logits, None, Sampling())
    assert drawn.dtype == jnp.int32
    np.testing.assert_array_equal(drawn, np.argmax(logits, axis=1))


@pytest.mark.parametrize(
    "options", [dict(temperature=-0.1), dict(top_k=-1), dict(top_p=0.0), dict(top_p=1.1), dict(top_p=-1.0)], ids=str
)
def test_impossible_options_are_refused(options):
    with pytest.raises(ConfigError) as refusal:
        Sampling(**options)
    assert next(iter(options)) in refusal.value.given and refusal.value.expected and refusal.value.todo
