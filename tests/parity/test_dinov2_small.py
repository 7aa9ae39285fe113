"""A real encoder, DINOv2-S/14, against PyTorch and against its original file; its features; and writing it back."""

from __future__ import annotations

import os
from pathlib import Path

import jax
import numpy as np
import pytest
import torch
from dinov2 import PACKAGE, REQUIREMENTS, dinov2
from PIL import Image
from safetensors.numpy import load_file
from transformers import Dinov2Model
from vision_checks import to_torch

import mllm_jax
from mllm_jax.data.image_processors import read_image_processor
from mllm_jax.datasets.openmoji.catalog import catalog
from mllm_jax.datasets.openmoji.images import EmojiImages
from mllm_jax.generation.embed import Embedder

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("optimized")]


@pytest.fixture(scope="module")
def folder(require_asset) -> Path:
    """Returns the folder, downloaded only if CI=true."""
    found = dinov2(fetch=os.environ.get("CI") == "true")
    require_asset(found, f"the package of {REQUIREMENTS.name}: python tests/assets/dinov2.py")
    return found


@pytest.fixture(scope="module")
def theirs(folder):
    return Dinov2Model.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()


@pytest.fixture(scope="module")
def ours(folder):
    return mllm_jax.from_pretrained(folder)


def real_pixels(folder: Path, height: int, width: int) -> np.ndarray:
    """Returns float32[2, height, width, 3]: two emoji, normalised by the folder's settings."""
    known = catalog("study", "train")
    drawn, processor = EmojiImages(known), read_image_processor(folder)
    mean, std = (np.asarray(value, np.float32) for value in (processor.mean, processor.std))
    images = [Image.fromarray(drawn.single(index, 256)).resize((width, height)) for index in (3, 700)]
    return (np.stack([np.asarray(image, np.float32) for image in images]) / 255 - mean) / std


# Its own 518 pixels, the common 224, and an image that is not square.
@pytest.mark.parametrize("size", [(518, 518), (224, 224), (140, 322)], ids=str)
def test_all_hidden_states_agree_with_torch(folder, ours, theirs, size, assert_close):
    module, params = ours
    pixels = real_pixels(folder, *size)[: 1 if size[0] > 500 else 2]
    with torch.no_grad():
        wanted = theirs(pixel_values=to_torch(pixels), output_hidden_states=True)
    found = jax.jit(lambda p, x: module.apply({"params": p}, x, output_hidden_states=True))(params, pixels)
    assert len(found.hidden_states) == len(wanted.hidden_states) == 13
    for layer, (mine, their) in enumerate(zip(found.hidden_states, wanted.hidden_states, strict=True)):
        assert_close(mine, their, 1e-4, f"hidden state {layer}")
    assert_close(found.last_hidden_state, wanted.last_hidden_state, 1e-4, "last hidden state")
    assert_close(found.pooler_output, wanted.pooler_output, 1e-4, "pooled")


def test_the_folder_has_the_bits_of_the_file_and_comes_back_with_them(folder, ours, tmp_path):
    import onnx

    graph = onnx.load(str(PACKAGE.find(fetch=os.environ.get("CI") == "true"))).graph
    stored = {t.name: onnx.numpy_helper.to_array(t) for t in graph.initializer}
    tensors = load_file(folder / "model.safetensors")
    prefix = "backbone."
    kept = {name.removeprefix(prefix): value for name, value in stored.items() if name.startswith(prefix)}
    assert len(kept) > 100, "most tensors keep their names"
    for name, value in kept.items():
        np.testing.assert_array_equal(tensors[name], value, err_msg=name)
    mllm_jax.save_pretrained(*ours, tmp_path / "back")
    back = load_file(tmp_path / "back" / "model.safetensors")
    assert set(tensors) - set(back) <= {"embeddings.mask_token"} and set(back) <= set(tensors)
    for name, value in back.items():
        np.testing.assert_array_equal(value, tensors[name], err_msg=name)


def test_features_are_better_than_pixels(folder, ours):
    """Measures how often the nearest of 132 emoji of other bases is of the same group of 22.

    The margin over pixels is small: the weights were tuned to separate figure from ground, on photographs.
    """
    known = catalog("study", "train")
    drawn, groups = EmojiImages(known), {}
    for _, indices in sorted(known.by_base.items()):
        groups.setdefault(known.records[indices[0]].subcategory, []).append(indices[0])
    chosen = [(group, i) for group, indices in sorted(groups.items()) if len(indices) >= 6 for i in indices[:6]]
    labels, images = np.array([group for group, _ in chosen]), [drawn.single(i, 224) for _, i in chosen]
    module, params = ours
    rng = np.random.default_rng(0)
    shuffled = jax.tree.map(lambda x: rng.permutation(np.asarray(x).ravel()).reshape(x.shape), params)

    def share(vectors: np.ndarray) -> float:
        vectors = vectors - vectors.mean(axis=0)
        vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
        similarity = vectors @ vectors.T
        np.fill_diagonal(similarity, -2)
        return float((labels[similarity.argmax(axis=1)] == labels).mean())

    processor = read_image_processor(folder)
    real, random = (
        share(Embedder(module, p, processor, batch_size=16).image_vectors(images)) for p in (params, shuffled)
    )
    pixels = share(np.stack([image.ravel() for image in images]).astype(np.float32))
    assert len(chosen) == 132 and real > pixels > random and real > 1.5 * random, (real, pixels, random)
