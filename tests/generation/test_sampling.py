"""The choice of the next token against the same filters in numpy and against transformers' own."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from transformers.generation import logits_process as theirs

from mllm_jax.errors import ConfigError
from mllm_jax.generation.sampling import Sampling, choose, filtered, row_keys

LOGITS = np.random.default_rng(0).normal(size=12).astype(np.float32) * 2


def distribution(logits, s: Sampling) -> np.ndarray:
    """Computes probabilities after temperature, top_k, top_p and min_p by sorting."""
    x = logits.astype(np.float64) / s.temperature
    order = np.argsort(-x)
    if s.top_k:
        order = order[: s.top_k]
    p = np.exp(x[order] - x.max())
    p /= p.sum()
    kept = np.concatenate([[0.0], np.cumsum(p)[:-1]]) < s.top_p
    kept &= p >= s.min_p * p.max()
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
        Sampling(temperature=1.5, min_p=0.2),
        Sampling(temperature=1.5, top_k=5, top_p=0.9, min_p=0.1),
    ],
    ids=str,
)
def test_frequencies(sampling):
    """Draws 20,000 tokens: none outside the kept tokens, each kept token with its frequency."""
    draws = 20_000
    rows = jnp.broadcast_to(jnp.asarray(LOGITS), (draws, 12))
    keys = row_keys(1, jnp.arange(draws))
    drawn = np.asarray(jax.jit(choose, static_argnums=3)(rows, keys, 0, sampling))
    assert drawn.dtype == np.int32
    found = np.bincount(drawn, minlength=12) / draws
    wanted = distribution(LOGITS, sampling)
    assert (found[wanted == 0] == 0).all()
    np.testing.assert_allclose(found, wanted, atol=5 * 0.5 / draws**0.5)


def test_rows_are_filtered_each_by_itself():
    logits = jnp.asarray(np.stack([LOGITS, LOGITS[::-1]]))
    sampling = Sampling(temperature=1.0, top_k=2)
    drawn = np.array([choose(logits, row_keys(0, jnp.arange(2)), step, sampling) for step in range(20)])
    best = np.argsort(-LOGITS)[:2]
    assert set(drawn[:, 0]) == set(best) and set(drawn[:, 1]) == set(11 - best)


def test_greedy_takes_the_largest_and_no_key():
    logits = jnp.asarray(np.random.default_rng(1).normal(size=(5, 12)))
    drawn = choose(logits, None, 0, Sampling())
    assert drawn.dtype == jnp.int32
    np.testing.assert_array_equal(drawn, np.argmax(logits, axis=1))


def processors(s: Sampling) -> theirs.LogitsProcessorList:
    """Returns transformers' filters in the order in which `generate` applies them."""
    found = theirs.LogitsProcessorList()
    if s.repetition_penalty != 1:
        found.append(theirs.RepetitionPenaltyLogitsProcessor(s.repetition_penalty))
    if s.temperature:
        found.append(theirs.TemperatureLogitsWarper(s.temperature))
        if s.top_k:
            found.append(theirs.TopKLogitsWarper(s.top_k))
        if s.top_p < 1:
            found.append(theirs.TopPLogitsWarper(s.top_p))
        if s.min_p:
            found.append(theirs.MinPLogitsWarper(s.min_p))
    return found


@pytest.mark.parametrize(
    "sampling",
    [
        Sampling(repetition_penalty=1.8),
        Sampling(repetition_penalty=0.6),
        Sampling(temperature=0.7),
        Sampling(temperature=1.0, top_k=5),
        Sampling(temperature=1.0, top_k=1000),
        Sampling(temperature=1.3, top_p=0.8),
        Sampling(temperature=1.3, min_p=0.15),
        Sampling(temperature=1.0, min_p=1.0),
        Sampling(temperature=1.7, top_k=20, top_p=0.7, min_p=0.1, repetition_penalty=1.5),
    ],
    ids=str,
)
def test_filters_equal_those_of_transformers(sampling):
    rng = np.random.default_rng(3)
    logits = rng.normal(size=(6, 50)).astype(np.float32) * 3
    said = rng.integers(0, 50, (6, 9))
    seen = np.zeros((6, 50), bool)
    np.put_along_axis(seen, said, True, axis=1)
    wanted = processors(sampling)(torch.tensor(said), torch.tensor(logits)).numpy()
    found = np.asarray(filtered(jnp.asarray(logits), sampling, jnp.asarray(seen)))
    np.testing.assert_array_equal(np.isinf(found), np.isinf(wanted))
    np.testing.assert_allclose(found, wanted, rtol=1e-5)
    assert not np.array_equal(wanted, logits) or sampling.top_k >= 50


def test_a_draw_depends_on_seed_prompt_and_step_alone():
    """Checks the same logits in other rows, with other rows, in a batch of another size."""
    logits = jnp.asarray(np.random.default_rng(4).normal(size=(40, 30)))
    sampling = Sampling(temperature=1.0)
    order = np.random.default_rng(5).permutation(40)
    drawn = np.asarray(choose(logits, row_keys(7, jnp.arange(40)), 3, sampling))
    moved = np.asarray(choose(logits[order], row_keys(7, jnp.asarray(order)), 3, sampling))
    np.testing.assert_array_equal(moved, drawn[order])
    alone = [int(choose(logits[i : i + 1], row_keys(7, jnp.array([i])), 3, sampling)[0]) for i in range(5)]
    assert alone == drawn[:5].tolist()
    for seed, step in ((8, 3), (7, 4)):
        assert (np.asarray(choose(logits, row_keys(seed, jnp.arange(40)), step, sampling)) != drawn).mean() > 0.5
    same = jnp.broadcast_to(logits[:1], logits.shape)
    assert len(set(np.asarray(choose(same, row_keys(7, jnp.arange(40)), 3, sampling)).tolist())) > 5


@pytest.mark.parametrize(
    "options",
    [
        dict(temperature=-0.1),
        dict(top_k=-1),
        dict(top_p=0.0),
        dict(top_p=1.1),
        dict(top_p=-1.0),
        dict(min_p=-0.1),
        dict(min_p=1.1),
        dict(repetition_penalty=0.0),
    ],
    ids=str,
)
def test_impossible_options_are_refused(options):
    with pytest.raises(ConfigError) as refusal:
        Sampling(**options)
    assert next(iter(options)) in refusal.value.given and refusal.value.expected and refusal.value.todo
