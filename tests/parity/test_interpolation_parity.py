"""Cubic weights against torch's bicubic interpolation, larger and smaller, with antialiasing and without."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import pytest
import torch

from mllm_jax.layers.interpolation import cubic_weights


@pytest.mark.parametrize("antialias", [False, True])
def test_resizing_equals_torch(antialias, assert_close):
    table = np.random.default_rng(0).normal(size=(1, 3, 7, 7)).astype(np.float32)
    for height, width in ((7, 7), (3, 5), (11, 6), (2, 20), (14, 14), (1, 1)):
        theirs = torch.nn.functional.interpolate(
            torch.tensor(table), size=(height, width), mode="bicubic", align_corners=False, antialias=antialias
        )
        rows = cubic_weights(jnp.arange(height), jnp.array(height), 7, antialias)
        columns = cubic_weights(jnp.arange(width), jnp.array(width), 7, antialias)
        ours = jnp.einsum("hr,wc,berc->behw", rows, columns, table)
        assert_close(ours, theirs, 1e-5, f"{height} x {width}")


@pytest.mark.parametrize("antialias", [False, True])
def test_places_may_differ_in_the_size_of_their_grid(antialias):
    index, count = jnp.array([[0, 2, 1], [4, 0, 0]]), jnp.array([[3, 3, 2], [9, 1, 5]])
    together = np.asarray(cubic_weights(index, count, 5, antialias))
    np.testing.assert_allclose(together.sum(-1), 1.0, atol=1e-6)
    for row in range(2):
        for column in range(3):
            alone = cubic_weights(index[row, column], count[row, column], 5, antialias)
            np.testing.assert_array_equal(together[row, column], alone)
