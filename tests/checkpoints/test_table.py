"""The fields of a family, each by its name, and one sample for each kind of module."""

from __future__ import annotations

from types import SimpleNamespace

import jax.numpy as jnp
import pytest

from mllm_jax.checkpoints.table import Family, Table, batch_sample, image_sample, token_sample

FILLED = dict(architectures=("Toy",), from_hf=dict, to_hf=dict, table=lambda config: Table(()))


def test_a_family_is_filled_by_keyword_only():
    assert Family(name="toy", **FILLED).name == "toy"
    with pytest.raises(TypeError, match="positional"):
        Family("toy", **FILLED)


def test_the_sample_is_by_default_a_batch_of_the_model():
    batch = {"tokens": jnp.zeros((1, 2), jnp.int32)}
    config = SimpleNamespace(batch_spec=lambda: SimpleNamespace(empty=lambda: batch))
    assert Family(name="toy", **FILLED).sample(config) == (batch,)
    assert Family(name="toy", **FILLED).sample is batch_sample


def test_samples_of_tokens_and_of_images():
    (tokens,) = token_sample(None)
    assert tokens.shape == (1, 1) and tokens.dtype == jnp.int32
    (image,) = image_sample(SimpleNamespace(image_size=6, num_channels=3))
    assert image.shape == (1, 6, 6, 3) and image.dtype == jnp.float32
