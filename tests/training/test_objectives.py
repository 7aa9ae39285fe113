"""Objectives on packed rows against numpy, and at their edges."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from mllm_jax.errors import ConfigError
from mllm_jax.layers.head import HeadInputs
from mllm_jax.training.objectives.contrastive import Contrastive
from mllm_jax.training.objectives.next_token import NextToken, cross_entropy


def given_logits(params, batch, method):
    """Applies a model whose parameters are the logits."""
    return HeadInputs(params, jnp.eye(params.shape[-1]))


@pytest.fixture
def case():
    """Returns packed examples with and without padding; the first token of a segment has a weight too."""
    rng = np.random.default_rng(0)
    logits = rng.normal(size=(2, 9, 7)).astype(np.float32) * 2
    batch = {
        "tokens": rng.integers(0, 7, (2, 9)).astype(np.int32),
        "segments": np.array([[1, 1, 1, 2, 2, 2, 2, 0, 0], [1, 1, 1, 1, 1, 2, 2, 2, 3]], np.int32),
        "loss_weights": np.array([[1, 0, 1, 1, 0, 1, 0.5, 0, 0], [1, 1, 1, 1, 1, 1, 1, 0, 1]], np.float32),
    }
    return logits, batch


def by_hand(logits, batch, z_loss=0.0):
    """Returns (loss, accuracy, weight): a weighted token carries loss if its own segment has a token before it."""
    loss = right = weight = 0.0
    for r, s in np.ndindex(batch["tokens"].shape):
        w = float(batch["loss_weights"][r, s])
        if s == 0 or w == 0 or batch["segments"][r, s] != batch["segments"][r, s - 1]:
            continue
        before = logits[r, s - 1].astype(np.float64)
        log_z = np.log(np.exp(before).sum())
        loss += w * (log_z - before[batch["tokens"][r, s]] + z_loss * log_z**2)
        right += w * (before.argmax() == batch["tokens"][r, s])
        weight += w
    return loss / weight, right / weight, weight


@pytest.mark.parametrize("logits_mib", [128, 1e-4], ids=["whole", "chunks"])
@pytest.mark.parametrize("z_loss", [0.0, 0.3])
def test_next_token_on_packed_rows(case, z_loss, logits_mib):
    logits, batch = case
    loss, metrics = NextToken(z_loss, logits_mib).loss(given_logits, jnp.asarray(logits), batch, None)
    wanted_loss, wanted_accuracy, wanted_weight = by_hand(logits, batch, z_loss)
    assert float(loss) == pytest.approx(wanted_loss, rel=1e-5)
    assert float(metrics["token_accuracy"]) == pytest.approx(wanted_accuracy, rel=1e-5)
    assert float(metrics["weight"]) == pytest.approx(wanted_weight)


def test_cross_entropy_and_its_gradient(case):
    logits, batch = case
    rng = np.random.default_rng(1)
    weights, more = rng.normal(size=(2, *batch["tokens"].shape)).astype(np.float32)

    def ours(logits):
        nll, log_z, _ = cross_entropy(logits, batch["tokens"])
        return (nll * weights + jnp.sin(log_z) * more).sum()

    def plain(logits):
        nll = optax.softmax_cross_entropy_with_integer_labels(logits, batch["tokens"])
        return (nll * weights + jnp.sin(jax.nn.logsumexp(logits, axis=-1)) * more).sum()

    (value, gradient), (wanted, wanted_gradient) = (jax.value_and_grad(f)(jnp.asarray(logits)) for f in (ours, plain))
    assert float(value) == pytest.approx(float(wanted), rel=1e-5)
    np.testing.assert_allclose(gradient, wanted_gradient, atol=1e-5)


def test_a_segment_is_not_predicted_from_the_one_before(case):
    logits, batch = case
    border = jnp.zeros((2, 9, 7)).at[0, 2].set(5.0).at[1, 4].set(5.0).at[1, 7].set(5.0)
    one, other = (
        NextToken().loss(given_logits, jnp.asarray(logits) + shift, batch, None)[0]
        for shift in (0, border * jnp.arange(7))
    )
    assert float(one) == float(other)


def test_a_batch_without_learnt_tokens_has_no_loss_and_no_gradient(case):
    logits, batch = case
    batch["loss_weights"] = batch["loss_weights"] * 0

    def loss(logits):
        return NextToken(0.1).loss(given_logits, logits, batch, None)

    (value, metrics), gradient = jax.value_and_grad(loss, has_aux=True)(jnp.asarray(logits))
    assert float(value) == 0 and float(metrics["weight"]) == 0
    assert (np.asarray(gradient) == 0).all()


def test_large_logits_stay_finite(case):
    logits, batch = case
    loss, _ = NextToken().loss(given_logits, jnp.asarray(logits) * 1e4, batch, None)
    assert np.isfinite(loss) and float(loss) > 1e3


def test_texts_with_the_same_words_in_another_order_are_negatives():
    vectors = jax.random.normal(jax.random.key(0), (3, 4))

    def loss(tokens):
        batch = {"tokens": jnp.asarray(tokens, jnp.int32), "segments": jnp.ones((3, 3), jnp.int32)}
        pairs = vectors[:, None], vectors[::-1, None], jnp.float32(2.0), jnp.float32(0.0)
        return float(Contrastive().loss(lambda params, batch, method: pairs, None, batch, None)[0])

    different = loss([[1, 2, 3], [4, 5, 6], [7, 8, 9]])
    assert loss([[1, 2, 3], [3, 2, 1], [2, 1, 3]]) == different
    assert loss([[1, 2, 3], [1, 2, 3], [2, 1, 3]]) < different - 1e-3


def test_unknown_kind_is_refused():
    with pytest.raises(ConfigError, match="triplet"):
        Contrastive("triplet")
