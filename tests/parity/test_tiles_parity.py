"""The positions of images in the text are those of their features in transformers' LLaVA models."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from transformers import LlavaNextModel, LlavaOnevisionModel

from mllm_jax.data.processing.media import NEWLINE
from mllm_jax.data.tiles import anyres_places, best_resolution, tile_places, video_places

TILE, GRID, WIDTH = 8, 4, 5
RESOLUTIONS = [[8 * a, 8 * b] for a, b in ((1, 2), (2, 1), (2, 2), (3, 1), (1, 3), (3, 3))]
SIZES = ((16, 16), (9, 30), (30, 9), (55, 176), (110, 35), (1, 400), (400, 1), (7, 8), (24, 24), (13, 11), (3, 9))


@pytest.fixture(scope="module")
def model():
    vision = SimpleNamespace(image_size=TILE, patch_size=TILE // GRID)
    return SimpleNamespace(config=SimpleNamespace(vision_config=vision, image_grid_pinpoints=RESOLUTIONS))


def summed(features: np.ndarray, newline: np.ndarray, places) -> np.ndarray:
    """Returns the vector at each position, of features [tiles, N, E]."""
    found = np.where(places.places[..., None] == NEWLINE, newline, features.reshape(-1, WIDTH)[places.places])
    return found if places.weights is None else (found * places.weights[..., None]).sum(axis=1)


def table_of(tiles: int) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(tiles)
    return rng.normal(size=(tiles, GRID**2, WIDTH)).astype(np.float32), rng.normal(size=WIDTH).astype(np.float32)


@pytest.mark.parametrize("most", [None, 9, 2, 1], ids=lambda most: f"at most {most}")
def test_images(model, most):
    lengths = set()
    for size in SIZES:
        target = best_resolution(size, tuple(map(tuple, RESOLUTIONS)))
        features, newline = table_of(1 + target[0] * target[1] // TILE**2)
        given = [torch.tensor(features)], torch.tensor([size])
        if most is None:
            wanted, _ = LlavaNextModel.pack_image_features(model, *given, "default", torch.tensor(newline))
        else:
            more = dict(image_newline=torch.tensor(newline), vision_aspect_ratio=f"anyres_max_{most}")
            wanted, _ = LlavaOnevisionModel.pack_image_features(model, *given, **more)
        places = anyres_places(size, target, TILE, GRID, most)
        found = summed(features, newline, places)
        np.testing.assert_allclose(found, wanted[0].numpy(), atol=1e-6, err_msg=str(size))
        lengths.add((len(found), places.weights is None))
    assert len(lengths) > 4 and (most in (None, 9)) == all(whole for _, whole in lengths)


def test_one_of_several_images(model):
    features, newline = table_of(1)
    wanted, _ = LlavaOnevisionModel.pack_image_features(
        model, [torch.tensor(features)], torch.tensor([[9, 30]]), torch.tensor(newline)
    )
    np.testing.assert_array_equal(summed(features, newline, tile_places(GRID)), wanted[0].numpy())


@pytest.mark.parametrize("grid", [4, 5, 1])
def test_videos(grid):
    vision = SimpleNamespace(image_size=2 * grid, patch_size=2)
    model = SimpleNamespace(config=SimpleNamespace(vision_config=vision))
    features = np.random.default_rng(grid).normal(size=(3, grid**2, WIDTH)).astype(np.float32)
    wanted = LlavaOnevisionModel.apply_pooling(model, torch.tensor(features)).reshape(-1, WIDTH).numpy()
    newline = np.ones(WIDTH, np.float32)
    found = summed(features, newline, video_places(3, grid))
    np.testing.assert_allclose(found[:-1], wanted, atol=1e-6)
    np.testing.assert_array_equal(found[-1], newline)
