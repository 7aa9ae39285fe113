"""Output projectors: shapes, masks, names of axes, sharding, refusals; and several conditions at once."""

from __future__ import annotations

from dataclasses import replace
from functools import lru_cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from jax.sharding import NamedSharding

from mllm_jax.errors import ConfigError, DataError
from mllm_jax.layers.attention import attention
from mllm_jax.layers.compute import Compute
from mllm_jax.models.registry import abstract_init
from mllm_jax.output_projectors.linear import LinearOutputProjectorConfig
from mllm_jax.output_projectors.mlp import MLPOutputProjectorConfig
from mllm_jax.output_projectors.protocol import OutputProjectorConfig
from mllm_jax.output_projectors.query_connector import QueryConnectorConfig
from mllm_jax.output_projectors.several import SeveralConditionsConfig, fill_positions
from mllm_jax.output_projectors.states import PromptStatesConfig
from mllm_jax.output_projectors.transformer import TransformerMapperConfig
from mllm_jax.sharding.logical import RULES, partition_spec, use_mesh
from mllm_jax.sharding.mesh import MeshConfig, make_mesh

SIZES = dict(tokens=4, input_size=8, output_size=6)
MAPPER = TransformerMapperConfig(**SIZES, output_tokens=5, hidden_size=8, num_layers=2, num_heads=2)
CONFIGS = {
    "linear": LinearOutputProjectorConfig(**SIZES, output_tokens=10),
    "mlp": MLPOutputProjectorConfig(**SIZES, output_tokens=10, hidden_size=8, num_layers=3),
    "states": PromptStatesConfig(**SIZES, dropped=1),
    "transformer": MAPPER,
    "connector": QueryConnectorConfig(**SIZES, head_dim=4, num_layers=2, mlp_size=16),
    "several": SeveralConditionsConfig(
        (
            replace(MAPPER, input_size=None, output_tokens=2, num_layers=1),
            LinearOutputProjectorConfig(4, None, 7, output_tokens=9),
        ),
        tokens=4,
        input_size=8,
    ),
}
EVERY = pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
RNG = np.random.default_rng(0)
STATES, EMBEDDINGS = (RNG.normal(size=(2, 4, 8)).astype(np.float32) for _ in range(2))


def as_tuple(x) -> tuple:
    return x if isinstance(x, tuple) else (x,)


@lru_cache
def boxed(config):
    return abstract_init(config.make(), STATES, EMBEDDINGS)


def random_params(config):
    rng = np.random.default_rng(1)
    return jax.tree.map(lambda x: 0.5 * rng.normal(size=x.shape).astype(np.float32), nn.meta.unbox(boxed(config)))


@lru_cache
def compiled(config):
    return jax.jit(lambda params, *given: config.make().apply({"params": params}, *given))


def apply(config, params, states=STATES, mask=None, embeddings=EMBEDDINGS):
    return compiled(config)(params, states, embeddings, mask)


@EVERY
def test_the_protocol_in_bfloat16_and_with_named_axes(config):
    assert isinstance(config, OutputProjectorConfig)
    for box in jax.tree.leaves(boxed(config), is_leaf=lambda x: isinstance(x, nn.meta.AxisMetadata)):
        assert len(box.names) == box.value.ndim and set(box.names) - {None} <= set(RULES)
    half = replace(config, compute=Compute(dtype="bfloat16"))
    params, mask = nn.meta.unbox(boxed(config)), jnp.ones((2, 4), bool)
    made = as_tuple(jax.eval_shape(half.make().apply, {"params": params}, STATES, EMBEDDINGS, mask))
    sizes = list(zip(as_tuple(config.output_tokens), as_tuple(config.output_size), strict=True))
    assert [(x.shape, x.dtype) for x in made] == [((2, *size), jnp.bfloat16) for size in sizes]
    kept = as_tuple(jax.eval_shape(config.output_mask, mask))
    assert all(x is None or x.shape == (2, n) for x, (n, _) in zip(kept, sizes, strict=True))
    assert set(as_tuple(config.output_mask(None))) == {None}


@EVERY
def test_states_that_do_not_count_have_no_influence(config):
    """Checks what counts: it is the same whatever the other states are, and what does not count is 0."""
    params = random_params(config)
    mask = np.array([[True, True, True, False], [True, True, False, False]])
    other = np.where(mask[..., None], STATES, 100 * STATES + 7)
    kept = as_tuple(config.output_mask(jnp.asarray(mask)))
    changed = False
    for one, two, whole, count in zip(
        *(as_tuple(apply(config, params, states, mask)) for states in (STATES, other)),
        as_tuple(apply(config, params)),
        kept,
        strict=True,
    ):
        np.testing.assert_allclose(one, two, rtol=1e-5, atol=1e-5)
        assert np.isfinite(one).all()
        count = np.ones(one.shape[:2], bool) if count is None else np.asarray(count)
        assert not np.asarray(one)[~count].any() and np.asarray(one)[count].any()
        changed |= not np.allclose(one, whole, atol=1e-4)
    assert changed


@EVERY
def test_two_devices_compute_the_same_and_every_parameter_has_a_gradient(config, devices):
    """Checks values and gradients with the parameters split over two devices, and with rematerialisation."""
    params, mask = random_params(config), jnp.array([[True, True, True, False], [True] * 4])

    def gradient(config):
        def loss(params, states):
            made = as_tuple(config.make().apply({"params": params}, states, EMBEDDINGS, mask))
            return sum((jnp.sin(x) * jnp.arange(1, x.size + 1).reshape(x.shape)).sum() for x in made), made

        return jax.grad(loss, has_aux=True)

    alone, made = jax.jit(gradient(config))(params, STATES)
    for path, leaf in jax.tree_util.tree_leaves_with_path(alone):
        name = jax.tree_util.keystr(path)
        # A bias of all keys cancels in the softmax; after a rotation it does not.
        cancels = "['k']['bias']" in name and not isinstance(config, QueryConnectorConfig)
        assert (np.abs(leaf).max() > 1e-3) != cancels, name
    # "several" holds a mapper too, whose matrices are then split the other way.
    mesh_config = MeshConfig(fsdp=1, tensor=2) if config in (MAPPER, CONFIGS["mlp"]) else MeshConfig(fsdp=2)
    mesh = make_mesh(mesh_config, devices[:2])
    specs = jax.tree.map(
        lambda box: NamedSharding(mesh, partition_spec(box.names, box.value.shape, mesh)),
        boxed(config),
        is_leaf=lambda x: isinstance(x, nn.meta.AxisMetadata),
    )
    placed = jax.device_put(params, specs)
    assert any(not leaf.sharding.is_fully_replicated for leaf in jax.tree.leaves(placed))
    with use_mesh(mesh):
        split, there = jax.jit(gradient(replace(config, compute=Compute(remat="full"))))(placed, STATES)
    for ours, theirs in ((made, there), (alone, split)):
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-3), ours, theirs)


def test_each_signal_gives_neighbouring_vectors():
    """Checks that 4 signals give 3 vectors each, of which the first 10 are kept."""
    for name in ("linear", "mlp"):
        config, changed = CONFIGS[name], STATES.copy()
        changed[:, 1] += 1
        params = random_params(config)
        differ = np.abs(apply(config, params) - apply(config, params, changed)).max(axis=(0, 2)) > 1e-6
        assert np.flatnonzero(differ).tolist() == [3, 4, 5]
    same = replace(CONFIGS["linear"], output_tokens=4)
    kernel = random_params(same)["out"]
    wanted = STATES @ kernel["kernel"][:, 0] + kernel["bias"][0]
    np.testing.assert_allclose(apply(same, {"out": kernel}), wanted, rtol=1e-5, atol=1e-5)


def test_the_mapper_adds_embeddings_and_the_order_of_queries_matters():
    params = random_params(MAPPER)
    swapped = apply(MAPPER, params, EMBEDDINGS, embeddings=STATES)
    np.testing.assert_allclose(apply(MAPPER, params), swapped, rtol=1e-5, atol=1e-5)
    connector = CONFIGS["connector"]
    params, order = random_params(connector), [2, 0, 3, 1]
    assert not np.allclose(apply(connector, params, STATES[:, order]), apply(connector, params)[:, order], atol=1e-3)


def test_several_conditions_are_those_of_their_projectors():
    config = CONFIGS["several"]
    params = random_params(config)
    for i, (each, made) in enumerate(zip(config.projectors, apply(config, params), strict=True)):
        alone = apply(replace(each, input_size=8), params[f"condition_{i}"])
        np.testing.assert_allclose(made, alone, rtol=1e-5, atol=1e-6)
    assert config.reads_embeddings and not SeveralConditionsConfig((CONFIGS["linear"],), tokens=4).reads_embeddings


def test_attention_reads_filled_positions_as_the_text():
    """Checks that attention to states that fill all positions equals masked attention, and the order of the states."""
    mask = np.arange(6) < np.array([[2], [3], [6]])
    states = RNG.normal(size=(3, 6, 4)).astype(np.float32)
    filled = fill_positions(jnp.asarray(states), jnp.asarray(mask), 12)
    np.testing.assert_array_equal(filled[1], np.repeat(states[1, :3], 4, axis=0))
    q = RNG.normal(size=(3, 5, 1, 4)).astype(np.float32)
    segments = np.ones((3, 5), np.int32), mask.astype(np.int32)
    whole = attention(q, states[:, :, None], states[:, :, None], q_segments=segments[0], k_segments=segments[1])
    np.testing.assert_allclose(attention(q, filled[:, :, None], filled[:, :, None]), whole, rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(fill_positions(jnp.asarray(states), jnp.asarray(mask), 3)[2], states[2, ::2])


@pytest.mark.parametrize(
    "make,message",
    [
        (lambda: LinearOutputProjectorConfig(tokens=0), "tokens 0"),
        (lambda: TransformerMapperConfig(output_tokens=0), "output_tokens 0"),
        (lambda: PromptStatesConfig(tokens=34, dropped=34), "output_tokens 0"),
        (lambda: PromptStatesConfig(dropped=-1), "dropped -1"),
        (lambda: MLPOutputProjectorConfig(num_layers=1), "take LinearOutputProjectorConfig"),
        (lambda: MLPOutputProjectorConfig(activation="sine"), "activation 'sine'"),
        (lambda: TransformerMapperConfig(num_heads=3), "heads that divide it"),
        (lambda: TransformerMapperConfig(num_layers=0), "0 layers"),
        (lambda: QueryConnectorConfig(hidden_size=100), "width 100 in heads of 64"),
        (lambda: QueryConnectorConfig(head_dim=3), "an even size"),
        (lambda: QueryConnectorConfig(num_layers=0), "0 layers"),
        (lambda: SeveralConditionsConfig((), tokens=4), "no projectors"),
        (lambda: SeveralConditionsConfig((MAPPER,), tokens=5), r"projectors of \[4\] tokens for 5"),
        *[(replace(config, input_size=None).make, "input_size None") for config in CONFIGS.values()],
    ],
    ids=lambda x: "",
)
def test_impossible_configs_are_refused(make, message):
    with pytest.raises(ConfigError, match=message):
        make()


@EVERY
def test_states_of_another_shape_are_refused(config):
    for states in (STATES[:, :3], STATES[..., :7]):
        with pytest.raises(DataError, match=r"\[rows, 4, 8\]"):
            jax.eval_shape(config.make().init, jax.random.key(0), states, EMBEDDINGS)
    if config.reads_embeddings:
        with pytest.raises(DataError, match="embeddings None"):
            jax.eval_shape(config.make().init, jax.random.key(0), STATES)
