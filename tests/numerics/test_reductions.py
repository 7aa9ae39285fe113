"""The library's sums over rows and columns against NumPy in float64, for many short rows, where compilers erred."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from mllm_jax.layers.head import HeadInputs, head_cross_entropy
from mllm_jax.layers.norms import LayerNorm, RMSNorm, as_unit_vectors
from mllm_jax.training.config import AdamW
from mllm_jax.training.objectives.next_token import cross_entropy
from mllm_jax.training.objectives.ring import RingPlan, pair_loss
from mllm_jax.training.optimizer import learning_rate, make_optimizer

pytestmark = pytest.mark.usefixtures("optimized")

SHAPES = ((4_096, 5), (32_769, 3), (40_000, 3), (70_001, 4))


@pytest.fixture(params=SHAPES, ids=lambda shape: "x".join(map(str, shape)))
def shape(request) -> tuple[int, int]:
    return request.param


def normal(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def close(found, wanted, rtol: float = 2e-5):
    """Checks that every element differs by at most `rtol` of itself and of the root mean square of all."""
    wanted = np.asarray(wanted, np.float64)
    assert np.shape(found) == wanted.shape
    scale = np.sqrt(np.mean(np.square(wanted)))
    np.testing.assert_allclose(np.asarray(found, np.float64), wanted, rtol=rtol, atol=rtol * scale)


@pytest.mark.parametrize("norm", [RMSNorm, LayerNorm])
def test_norms_and_their_gradients(norm, shape):
    x, cotangent, scale = normal(*shape), normal(*shape, seed=1), 1 + 0.1 * normal(shape[1], seed=2)
    bias = {"bias": 0.1 * normal(shape[1], seed=3)} if norm is LayerNorm else {}

    @jax.jit
    def both(params, x, cotangent):
        value, vjp = jax.vjp(lambda params, x: norm().apply({"params": params}, x), params, x)
        return value, vjp(cotangent)

    found, (of_params, of_x) = both({"scale": scale, **bias}, x, cotangent)

    x, cotangent, scale = (each.astype(np.float64) for each in (x, cotangent, scale))
    centre = (lambda v: v - v.mean(axis=1, keepdims=True)) if norm is LayerNorm else (lambda v: v)
    inverse = 1 / np.sqrt(np.square(centre(x)).mean(axis=1, keepdims=True) + norm().eps)
    unit, slope = centre(x) * inverse, cotangent * scale
    close(found, unit * scale + bias.get("bias", 0))
    # The inverse is large for a row that is nearly constant, and so is the effect of rounding on the gradient.
    error = np.abs(of_x - inverse * (centre(slope) - unit * (slope * unit).mean(axis=1, keepdims=True)))
    assert (error <= 1e-5 * inverse * (1 + inverse) * (1 + np.abs(slope).sum(axis=1, keepdims=True))).all()
    close(of_params["scale"], (cotangent * unit).sum(axis=0), 1e-4)
    if bias:
        close(of_params["bias"], cotangent.sum(axis=0), 1e-4)


def test_unit_vectors(shape):
    x = normal(*shape)
    close(jax.jit(as_unit_vectors)(x), x / np.linalg.norm(x.astype(np.float64), axis=1, keepdims=True))


def test_the_global_norm(shape):
    tree = {"a": normal(*shape), "b": normal(shape[0], seed=1)}
    exact = np.sqrt(sum(np.square(leaf.astype(np.float64)).sum() for leaf in tree.values()))
    close(jax.jit(optax.tree.norm)(tree), exact)


def test_clipping_and_adamw(shape):
    config, steps = AdamW(learning_rate=0.1, warmup_steps=2, weight_decay=0.1), 10
    params, gradients = {"kernel": normal(*shape)}, [normal(*shape, seed=seed) for seed in (1, 2, 3)]
    optimizer, schedule = make_optimizer(config, steps), learning_rate(config, steps)
    state, update = optimizer.init(params), jax.jit(optimizer.update)
    exact, first, second = params["kernel"].astype(np.float64), 0.0, 0.0
    for number, gradient in enumerate(gradients):
        updates, state = update({"kernel": gradient}, state, params)
        params = optax.apply_updates(params, updates)
        clipped = gradient.astype(np.float64)
        clipped *= min(1, config.clip_norm / np.sqrt(np.square(clipped).sum()))
        first = config.b1 * first + (1 - config.b1) * clipped
        second = config.b2 * second + (1 - config.b2) * clipped**2
        mean, spread = first / (1 - config.b1 ** (number + 1)), second / (1 - config.b2 ** (number + 1))
        step = mean / (np.sqrt(spread) + config.eps) + config.weight_decay * exact
        exact = exact - float(schedule(number)) * step
    close(params["kernel"], exact, 1e-4)


def exact_cross_entropy(logits, targets):
    """Returns (-log softmax(logits)[targets], its gradient with respect to the logits) in float64."""
    logits = logits.astype(np.float64)
    raised = np.exp(logits - logits.max(axis=1, keepdims=True))
    probability = raised / raised.sum(axis=1, keepdims=True)
    rows = np.arange(len(logits))
    slope = probability.copy()
    slope[rows, targets] -= 1
    return -np.log(probability[rows, targets]), slope


def test_softmax_and_cross_entropy(shape):
    logits = 3 * normal(*shape)
    targets = np.random.default_rng(1).integers(0, shape[1], shape[0]).astype(np.int32)
    nll, slope = exact_cross_entropy(logits, targets)
    found, gradient = jax.jit(jax.value_and_grad(lambda x: cross_entropy(x, targets)[0].sum()))(logits)
    close(found, nll.sum())
    close(jax.jit(lambda x: cross_entropy(x, targets)[0])(logits), nll)
    close(gradient, slope)
    softmax = slope.copy()
    softmax[np.arange(shape[0]), targets] += 1
    close(jax.jit(jax.nn.softmax)(logits), softmax)


def test_the_head_chunk_by_chunk(shape):
    (rows, width), vocabulary = shape, 6
    x, matrix = normal(rows, width), normal(width, vocabulary, seed=1)
    targets = np.random.default_rng(1).integers(0, vocabulary, rows).astype(np.int32)
    weights = (np.random.default_rng(2).random(rows) < 0.5).astype(np.float32)

    def loss(x, matrix):
        head = HeadInputs(x[None], matrix, tied=False)
        return head_cross_entropy(head, jnp.asarray(targets)[None], jnp.asarray(weights)[None], 0.0, 4).loss

    found, (of_x, of_matrix) = jax.jit(jax.value_and_grad(loss, argnums=(0, 1)))(x, matrix)
    nll, slope = exact_cross_entropy(x.astype(np.float64) @ matrix, targets)
    slope = slope * weights[:, None]
    close(found, (nll * weights).sum())
    close(of_x, slope @ matrix.T)
    close(of_matrix, x.T.astype(np.float64) @ slope, 1e-4)


@pytest.mark.parametrize("kind", ["softmax", "sigmoid"])
def test_the_contrastive_losses(kind):
    rows, width, scale, bias = 4_096, 3, 5.0, -2.0
    image, text = (np.asarray(as_unit_vectors(normal(rows, width, seed=seed))) for seed in (0, 1))
    code = np.stack([np.arange(1, rows + 1), np.ones(rows)], axis=1).astype(np.uint32)[:, None]
    plan = RingPlan(kind, 1_024)

    def loss(image, text):
        return pair_loss(plan, image[:, None], text[:, None], code, jnp.float32(scale), jnp.float32(bias))[0]

    found, (of_image, of_text) = jax.jit(jax.value_and_grad(loss, argnums=(0, 1)))(image, text)
    image, text = image.astype(np.float64), text.astype(np.float64)
    logits, own = scale * image @ text.T, np.eye(rows)
    if kind == "softmax":
        (one, by_row), (other, by_column) = (exact_cross_entropy(each, np.arange(rows)) for each in (logits, logits.T))
        exact, slope = (one.sum() + other.sum()) / 2, (by_row + by_column.T) / 2
    else:
        signed = (2 * own - 1) * (logits + bias)
        exact, slope = np.logaddexp(0, -signed).sum(), -(2 * own - 1) / (1 + np.exp(signed))
    close(found, exact)
    close(of_image, scale * slope @ text, 1e-4)
    close(of_text, scale * slope.T @ image, 1e-4)
