"""Stacks of layers as tuples of layers, and back."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from tiny_language import CONFIG, random_params

from mllm_jax.generation.decode_step import CacheLayout, restack, unrolled, unstack
from mllm_jax.llms.t5 import T5Config


def same(a, b) -> None:
    assert jax.tree.structure(a) == jax.tree.structure(b)
    jax.tree.map(np.testing.assert_array_equal, a, b)


def test_parameters_come_back_as_they_were():
    params = random_params()
    apart = unstack({"llm": params, "projector": {"kernel": jnp.ones(2)}})
    layers = apart["llm"]["layers"]
    assert isinstance(layers, tuple) and len(layers) == CONFIG.num_layers
    np.testing.assert_array_equal(layers[1]["mlp"]["up"]["kernel"], params["layers"]["mlp"]["up"]["kernel"][1])
    q, out = (params["layers"]["attention"][name]["kernel"] for name in ("q", "out"))
    held = [layers[1]["attention"][name]["kernel"] for name in ("q", "out")]
    assert [matrix.values.shape for matrix in held] == [
        (q.shape[1], q[0, 0].size),
        (out[0, :, :, 0].size, out.shape[3]),
    ]
    np.testing.assert_array_equal(held[0].kernel(), q[1])
    same(restack(apart)["llm"], params)
    same(restack(params), params)


def test_only_the_scan_changes():
    assert unrolled(CONFIG).scan_unroll == CONFIG.num_layers and unrolled(CONFIG).hidden_size == CONFIG.hidden_size
    assert unrolled(T5Config(9, num_layers=2, num_decoder_layers=5)).scan_unroll == 5


def test_a_cache_is_split_joined_and_reordered():
    for config in (CONFIG, T5Config(9, 8, 4, num_heads=2, num_layers=1, num_decoder_layers=3)):
        layout = CacheLayout.of(lambda rows, config=config: config.make_cache(rows, 5))
        cache = jax.tree.map(lambda x: jnp.arange(x.size).reshape(x.shape), config.make_cache(4, 6))
        parts = layout.split(cache)
        same(layout.join(parts), cache)
        assert all(leaf.shape[0] == 4 for leaf in jax.tree.leaves(parts)), "rows first, once layers are apart"
        take = partial(jnp.take, indices=jnp.array([2, 2, 0, 1]))
        moved = layout.map(lambda leaf, axis, take=take: take(leaf, axis=axis), cache)
        np.testing.assert_array_equal(moved.keys[:, 1], cache.keys[:, 2])
        np.testing.assert_array_equal(moved.segments[3], cache.segments[1])
        same(layout.map(lambda leaf, axis, take=take: take(leaf, axis=axis), parts), layout.split(moved))
