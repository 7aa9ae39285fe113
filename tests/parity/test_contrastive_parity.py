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
    assert method == "embed_pairs"
    return params["image"], params["text"], params["scale"], params["bias"]


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
        return Contrastive("softmax").loss(given_vectors, p, {"tokens": jnp.asarray(tokens)}, None)

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
    batch = {"tokens": jnp.asarray(tokens)}
    ours, _ = Contrastive("sigmoid").loss(given_vectors, params, batch, None)
    assert_close(ours, total / 5, 1e-5, "loss")
