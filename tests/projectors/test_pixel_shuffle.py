"""The pixel shuffle: its order, its counts and its refusals."""

from __future__ import annotations

import numpy as np
import pytest

from mllm_jax.errors import ConfigError
from mllm_jax.projectors.pixel_shuffle import PixelShuffleProjectorConfig, pixel_shuffle


def test_which_patch_lands_where():
    positions = np.stack(np.meshgrid(np.arange(4), np.arange(6), indexing="ij"), axis=-1)[None]
    kept, swapped = pixel_shuffle(positions, 2), pixel_shuffle(positions, 2, "v1")
    assert kept.shape == (1, 2, 3, 8) and swapped.shape == (1, 3, 2, 8)
    assert kept[0, 1, 2].reshape(4, 2).tolist() == [[2, 4], [2, 5], [3, 4], [3, 5]]
    np.testing.assert_array_equal(swapped, kept.transpose(0, 2, 1, 3))


def test_counts_and_refusals():
    c = PixelShuffleProjectorConfig(output_size=8)
    assert c.num_tokens(32) == 256, "448 pixels of patch 14"
    with pytest.raises(ConfigError, match="(?s)grid of 5 x 5"):
        c.num_tokens(5)
    with pytest.raises(ConfigError, match="(?s)grid of 3 x 3"):
        c.make().init({}, np.zeros((1, 9, 4), np.float32))
    for wrong in (dict(version="v3"), dict(activation="sine"), dict(factor=0)):
        with pytest.raises(ConfigError, match=f"pixel shuffle: {next(iter(wrong))}"):
            PixelShuffleProjectorConfig(output_size=8, **wrong)
