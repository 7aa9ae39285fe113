"""The MLP projector against torch, and its merging of patches against InternVL's pixel shuffle."""

from __future__ import annotations

import jax
import numpy as np
import pytest
import torch
from einops import rearrange
from flax import linen as nn
from transformers.models.internvl.modeling_internvl import InternVLModel

from mllm_jax.projectors.mlp import MLPProjectorConfig


@pytest.mark.parametrize("merge,norm", [(1, False), (2, True)])
def test_projector(merge, norm, randomise, assert_close, assert_same_tree):
    width, side = 12 * merge**2, 4
    reference = torch.nn.Sequential(torch.nn.Linear(width, 20), torch.nn.GELU(), torch.nn.Linear(20, 14))
    layer_norm = torch.nn.LayerNorm(width, eps=1e-6)
    randomise(reference), randomise(layer_norm, seed=1)
    c = MLPProjectorConfig(output_size=14, hidden_size=20, merge=merge, input_norm=norm)
    params = {
        name: {"kernel": layer.weight.detach().numpy().T, "bias": layer.bias.detach().numpy()}
        for name, layer in (("linear_1", reference[0]), ("linear_2", reference[2]))
    }
    if norm:
        params["norm"] = {"scale": layer_norm.weight.detach().numpy(), "bias": layer_norm.bias.detach().numpy()}
    features = np.random.default_rng(0).normal(size=(2, side * side, 12)).astype(np.float32)
    assert_same_tree(params, nn.meta.unbox(jax.eval_shape(c.make().init, jax.random.key(0), features)["params"]))

    x = torch.tensor(features)
    if merge > 1:
        # The method uses nothing of its instance, so none is built.
        grid = rearrange(x, "b (h w) e -> b h w e", h=side)
        x = InternVLModel.pixel_shuffle(None, grid, scale_factor=1 / merge).flatten(1, 2)
    with torch.no_grad():
        theirs = reference(layer_norm(x) if norm else x).numpy()
    ours = c.make().apply({"params": params}, features)
    assert ours.shape[1] == c.num_tokens(side)
    assert_close(ours, theirs, 1e-4, "projected")
