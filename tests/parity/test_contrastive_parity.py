"""InfoNCE against torch's cross-entropy with its gradients, the sigmoid loss against its formula."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from mllm_jax.training.objectives.contrastive import Contrastive

SCALE, BIAS = 6.0, -1.5


def given_vectors(params, batch, method):
    """Returns vectors of [pairs, size] in rows with as many captions as the batch has segments."""
    assert method == "embed_pairs"
    rows = batch["tokens"].shape[0]
    image, text = (params[name].reshape(rows, -1, params[name].shape[-1]) for name in ("image", "text"))
    return image, text, params["scale"], params["bias"]


def batch_of(tokens) -> dict:
    return {"tokens": jnp.asarray(tokens), "segments": jnp.ones_like(jnp.asarray(tokens))}


def unit_vectors(seed: int, rows: int = 5, size: int = 7) -> np.ndarray:
    x = np.random.default_rng(seed).normal(size=(rows, size))
    return (x / np.linalg.norm(x, axis=1, keepdims=True)).astype(np.float32)


@pytest.fixture
def params():
    return {
        "image": jnp.asarray(unit_vectors(0)),
        "text": jnp.asarray(unit_vectors(1)),
        "scale": jnp.float32(SCALE),
        "bias": jnp.float32(BIAS),
    }


DIFFERENT = np.arange(20, dtype=np.int32).reshape(5, 4)
EQUAL = DIFFERENT[[0, 1, 1, 3, 4]]  # rows 1 and 2 have the same text


@pytest.mark.parametrize("tokens", [DIFFERENT, EQUAL], ids=["different texts", "equal texts"])
def test_info_nce(tokens, params, assert_close):
    image = torch.tensor(np.asarray(params["image"]), requires_grad=True)
    text = torch.tensor(np.asarray(params["text"]), requires_grad=True)
    scale = torch.tensor(SCALE, requires_grad=True)
    logits = scale * image @ text.T + BIAS
    same = torch.tensor((tokens[:, None] == tokens[None]).all(-1)) & ~torch.eye(5, dtype=torch.bool)
    logits = logits.masked_fill(same, float("-inf"))
    own = torch.arange(5)
    cross_entropy = torch.nn.functional.cross_entropy
    theirs = (cross_entropy(logits, own) + cross_entropy(logits.T, own)) / 2
    theirs.backward()

    def loss(p):
        return Contrastive("softmax").loss(given_vectors, p, batch_of(tokens), None)

    (ours, metrics), grads = jax.value_and_grad(loss, has_aux=True)(params)
    assert_close(ours, theirs.item(), 1e-5, "loss")
    assert_close(grads["image"], image.grad.numpy(), 1e-4, "image gradient")
    assert_close(grads["text"], text.grad.numpy(), 1e-4, "text gradient")
    assert_close(grads["scale"], scale.grad.item(), 1e-4, "scale gradient")
    right = (logits.argmax(1) == own).float().mean().item()
    assert float(metrics["recall_at_1"]) == pytest.approx(right)
    assert float(metrics["weight"]) == 5


@pytest.mark.parametrize("tokens", [DIFFERENT, EQUAL], ids=["different texts", "equal texts"])
def test_sigmoid(tokens, params, assert_close):
    x, y = np.asarray(params["image"], np.float64), np.asarray(params["text"], np.float64)
    total = 0.0
    for i in range(5):
        for j in range(5):
            if i != j and (tokens[i] == tokens[j]).all():
                continue
            sign = 1 if i == j else -1
            total += np.log1p(np.exp(-sign * (SCALE * x[i] @ y[j] + BIAS)))
    ours, _ = Contrastive("sigmoid").loss(given_vectors, params, batch_of(tokens), None)
    assert_close(ours, total / 5, 1e-5, "loss")


@pytest.mark.parametrize("kind", ["softmax", "sigmoid"])
def test_captions_packed_into_rows_count_as_separate_pairs(kind, assert_close):
    """Checks four captions, one of them twice, in rows of up to two: the same loss as four rows of one."""
    words = [[3, 4], [4, 3], [5, 6], [3, 4]]
    vectors = {"image": unit_vectors(0, 6), "text": unit_vectors(1, 6), "scale": SCALE, "bias": BIAS}
    packed = {
        "tokens": jnp.array([[3, 4, 4, 3, 0], [5, 6, 0, 0, 0], [3, 4, 0, 0, 0]], jnp.int32),
        "segments": jnp.array([[1, 1, 2, 2, 0], [1, 1, 0, 0, 0], [1, 1, 0, 0, 0]], jnp.int32),
    }
    there = np.array([0, 1, 2, 4])  # the second caption of the last two rows is empty
    alone = vectors | {name: vectors[name][there] for name in ("image", "text")}
    wanted, wanted_metrics = Contrastive(kind).loss(given_vectors, alone, batch_of(np.array(words, np.int32)), None)
    loss, metrics = Contrastive(kind).loss(given_vectors, vectors, packed, None)
    assert_close(loss, wanted, 1e-6, "loss")
    assert float(metrics["weight"]) == float(wanted_metrics["weight"]) == 4
    assert float(metrics["recall_at_1"]) == float(wanted_metrics["recall_at_1"])
    gradient = jax.grad(lambda v: Contrastive(kind).loss(given_vectors, v, packed, None)[0])(vectors)
    moved = np.abs(np.asarray(gradient["image"])).max(axis=1) > 0
    assert moved.tolist() == [place in there for place in range(6)], "an empty caption has no gradient"
