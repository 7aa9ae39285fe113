"""The contrastive objective on a sharded batch, against all pairs at once on one device; and the memory it takes."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from toy_data import quick_compilation

from mllm_jax.errors import ConfigError
from mllm_jax.sharding.logical import use_mesh
from mllm_jax.sharding.mesh import MeshConfig, batch_sharding, make_mesh
from mllm_jax.training.objectives.contrastive import KINDS, Contrastive

ROWS, CAPTIONS, SIZE = 16, 3, 6
MESHES = {
    "data": MeshConfig(data=8),
    "data and fsdp": MeshConfig(data=2, fsdp=4),
    "tensor": MeshConfig(data=2, fsdp=2, tensor=2),
    "context": MeshConfig(data=1, fsdp=2, context=4),
}


@pytest.fixture(scope="module", autouse=True)
def _quickly():
    with quick_compilation():
        yield


def pairs_of(params, batch, method):
    assert method == "embed_pairs"
    unit = [params[k] / jnp.linalg.norm(params[k], axis=-1, keepdims=True) for k in ("image", "text")]
    return *unit, params["scale"], params["bias"]


def example(rows: int = ROWS, captions: int = CAPTIONS, size: int = SIZE) -> tuple[dict, dict]:
    """Makes parameters and a batch with equal texts in rows and across shards, and some empty positions."""
    rng = np.random.default_rng(0)
    params = {k: jnp.asarray(rng.normal(size=(rows, captions, size)), jnp.float32) for k in ("image", "text")}
    params |= dict(scale=jnp.float32(9.0), bias=jnp.float32(-2.5))
    tokens = rng.integers(0, 2, (rows, 4 * captions)).astype(np.int32)
    segments = np.repeat(np.arange(1, captions + 1), 4)[None] * np.ones((rows, 1), int)
    segments[rng.random(segments.shape) < 0.1] = 0
    for row in rng.choice(rows, rows // 4, replace=False):
        segments[row][segments[row] == captions] = 0
    return params, dict(tokens=jnp.asarray(tokens), segments=jnp.asarray(segments, jnp.int32))


def dense(kind: str, params, batch):
    """Computes the definition, with all pairs in one matrix."""
    image, text, scale, bias = pairs_of(params, batch, "embed_pairs")
    tokens, segments = np.asarray(batch["tokens"]), np.asarray(batch["segments"])
    words = [tuple(t[s == c]) for t, s in zip(tokens, segments, strict=True) for c in range(1, text.shape[1] + 1)]
    there = np.array([len(w) > 0 for w in words])
    equal = np.array([[a == b for b in words] for a in words])
    own = np.eye(len(words), dtype=bool)
    kept = (own | ~equal) & there[:, None] & there[None]
    logits = scale * jnp.einsum("bcp,dep->bcde", image, text).reshape(len(words), -1) + bias
    if kind == "sigmoid":
        return jnp.where(kept, jax.nn.softplus(jnp.where(own, -logits, logits)), 0).sum() / there.sum()
    logits = jnp.where(kept, logits, -jnp.inf)[there][:, there]
    true = jnp.diagonal(logits)
    return sum(jax.nn.logsumexp(logits, axis=axis) - true for axis in (0, 1)).mean() / 2


@pytest.fixture(scope="module")
def wanted():
    params, batch = example()
    return {kind: jax.value_and_grad(lambda p, kind=kind: dense(kind, p, batch))(params) for kind in KINDS}


def assert_equal(found, wanted):
    """Checks losses and gradients, each to within 1e-5 of its largest number."""
    for (path, ours), theirs in zip(jax.tree.leaves_with_path(found), jax.tree.leaves(wanted), strict=True):
        # A bias that is common to all logits changes no softmax: its gradient is zero, up to rounding.
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-5 * float(jnp.abs(theirs).max()) + 1e-6, err_msg=path)


@pytest.mark.parametrize("kind", KINDS)
def test_the_example_exercises_what_it_should(kind, wanted):
    _, batch = example()
    codes = np.asarray(batch["tokens"])
    assert len({t.tobytes() for t in codes.reshape(-1, 4)}) < ROWS * CAPTIONS, "some texts are equal"
    assert (np.asarray(batch["segments"]) == CAPTIONS).any(axis=1).mean() < 1, "some positions are empty"
    loss, gradient = wanted[kind]
    assert loss > 0.5 and abs(gradient["scale"]) > 1e-3
    assert (abs(gradient["bias"]) > 1e-2) == (kind == "sigmoid")


@pytest.mark.parametrize("name", MESHES)
@pytest.mark.parametrize("kind", KINDS)
def test_a_sharded_batch_has_the_loss_and_the_gradients_of_the_whole(kind, name, wanted, devices):
    params, batch = example()
    mesh = make_mesh(MESHES[name], devices)
    rows = batch_sharding(mesh, 2)
    placed = {k: jax.device_put(params[k], rows) if k in ("image", "text") else params[k] for k in params}

    def loss(p, b):
        with use_mesh(mesh):
            return Contrastive(kind, chunk=5).loss(pairs_of, p, b, None)  # 5 divides no device's share: 6, 12 or 24

    step = jax.jit(jax.value_and_grad(loss, has_aux=True))
    (value, metrics), gradient = step(placed, jax.device_put(batch, rows))
    assert_equal((value, gradient), wanted[kind])
    assert gradient["image"].sharding.is_equivalent_to(batch_sharding(mesh, 3), 3)
    _, plain = Contrastive(kind).loss(pairs_of, params, batch, None)
    assert {k: float(v) for k, v in metrics.items()} == pytest.approx({k: float(v) for k, v in plain.items()})


@pytest.mark.parametrize("chunk", [1, 7, 48, 1024])
@pytest.mark.parametrize("kind", KINDS)
def test_chunks_of_any_size_on_one_device(kind, chunk, wanted):
    params, batch = example()
    objective = Contrastive(kind, chunk=chunk)
    found = jax.jit(jax.value_and_grad(lambda p: objective.loss(pairs_of, p, batch, None)[0]))(params)
    assert_equal(found, wanted[kind])


def test_rows_that_the_mesh_does_not_divide(devices):
    params, batch = example(rows=6)
    mesh = make_mesh(MeshConfig(data=4, fsdp=2), devices)

    def loss(p):
        with use_mesh(mesh):
            return Contrastive().loss(pairs_of, p, batch, None)[0]

    assert_equal(
        jax.jit(jax.value_and_grad(loss))(params), jax.value_and_grad(lambda p: dense("softmax", p, batch))(params)
    )


def temporaries(kind: str, rows: int, mesh, objective) -> int:
    """Returns the bytes of the loss and its gradient on one device, without inputs and outputs."""
    params = {
        k: jax.ShapeDtypeStruct((rows, 1, 32), jnp.float32, sharding=batch_sharding(mesh, 3)) for k in ("image", "text")
    }
    params |= {k: jax.ShapeDtypeStruct((), jnp.float32) for k in ("scale", "bias")}
    batch = {
        k: jax.ShapeDtypeStruct((rows, 2), jnp.int32, sharding=batch_sharding(mesh, 2)) for k in ("tokens", "segments")
    }

    def loss(p, b):
        with use_mesh(mesh):
            return objective(p, b)

    compiled = jax.jit(jax.grad(loss)).lower(params, batch).compile()
    return compiled.memory_analysis().temp_size_in_bytes


@pytest.mark.parametrize("kind", KINDS)
def test_memory_grows_with_the_local_batch_and_not_with_its_square(kind, devices):
    mesh = make_mesh(MeshConfig(data=8), devices)

    def ours(p, b):
        return Contrastive(kind, chunk=64).loss(pairs_of, p, b, None)[0]

    small, large = (temporaries(kind, rows, mesh, ours) for rows in (2048, 8192))
    assert large < 4.5 * small, "four times the batch takes four times the memory"

    def all_at_once(p, b):
        image, text, scale, bias = (x[:, 0] if x.ndim else x for x in pairs_of(p, b, "embed_pairs"))
        logits = scale * image @ text.T + bias
        return jax.nn.logsumexp(logits, axis=1).mean() - jnp.diagonal(logits).mean()

    small_dense, large_dense = (temporaries(kind, rows, mesh, all_at_once) for rows in (2048, 8192))
    assert large_dense > 10 * small_dense, "the measure can tell"
    assert large_dense > 10 * large


def test_a_text_equal_to_the_own_one_in_vector_but_not_in_words_is_a_miss():
    """Checks a bag of words, which cannot distinguish two orders of the same words and must not gain from guessing."""
    vectors = jnp.ones((4, 1, 3))
    batch = {"tokens": jnp.arange(8).reshape(4, 2), "segments": jnp.ones((4, 2), jnp.int32)}
    params = dict(image=vectors, text=vectors, scale=jnp.float32(1), bias=jnp.float32(0))
    _, metrics = Contrastive().loss(pairs_of, params, batch, None)
    assert metrics["recall_at_1"] == 0


def test_an_empty_batch_has_no_loss_and_no_gradient():
    params, batch = example()
    batch["segments"] = jnp.zeros_like(batch["segments"])
    value, gradient = jax.value_and_grad(lambda p: Contrastive().loss(pairs_of, p, batch, None)[0])(params)
    assert value == 0 and all((np.asarray(g) == 0).all() for g in jax.tree.leaves(gradient))


def test_a_chunk_of_nothing_is_refused():
    with pytest.raises(ConfigError, match="chunk 0"):
        Contrastive(chunk=0)
