"""Convolution and group norm against PyTorch's."""

from __future__ import annotations

import jax
import numpy as np
import pytest
import torch
from einops import rearrange
from flax import linen as nn

from mllm_jax.generators.basic import CONV2D, Conv2D, GroupNorm
from mllm_jax.sharding.logical import RULES

X = np.random.default_rng(0).normal(2.0, 3.0, (2, 7, 10, 12)).astype(np.float32)


def from_torch(tensor: torch.Tensor, pattern: str) -> np.ndarray:
    return rearrange(tensor.detach().numpy(), pattern)


@pytest.mark.parametrize(
    "ours,theirs,zeros",
    [
        (dict(), dict(kernel_size=3, padding=1), None),
        (dict(size=1, use_bias=False), dict(kernel_size=1, bias=False), None),
        (dict(stride=2, padding=((0, 1), (0, 1))), dict(kernel_size=3, stride=2), (0, 1, 0, 1)),
        (dict(size=5, stride=2, padding=1), dict(kernel_size=5, stride=2, padding=1), None),
    ],
)
def test_convolution(ours, theirs, zeros):
    torch.manual_seed(0)
    reference, x = torch.nn.Conv2d(12, 6, **theirs), torch.tensor(rearrange(X, "b h w c -> b c h w"))
    expected = reference(x if zeros is None else torch.nn.functional.pad(x, zeros))
    params = {"kernel": from_torch(reference.weight, CONV2D)}
    if reference.bias is not None:
        params["bias"] = reference.bias.detach().numpy()
    module = Conv2D(6, **ours)
    shapes = jax.tree.map(np.shape, nn.meta.unbox(jax.eval_shape(module.init, jax.random.key(0), X)["params"]))
    assert shapes == jax.tree.map(np.shape, params)
    found = module.apply({"params": params}, X)
    np.testing.assert_allclose(found, from_torch(expected, "b c h w -> b h w c"), atol=2e-5)


@pytest.mark.parametrize("shape", [(2, 7, 10, 12), (2, 70, 12), (2, 2, 5, 7, 12), (2, 12)])
def test_group_norm_of_images_sequences_videos_and_vectors(shape):
    torch.manual_seed(0)
    reference, x = torch.nn.GroupNorm(3, 12, eps=1e-2), X.ravel()[: np.prod(shape)].reshape(shape)
    torch.nn.init.normal_(reference.weight)
    torch.nn.init.normal_(reference.bias)
    params = {"scale": reference.weight.detach().numpy(), "bias": reference.bias.detach().numpy()}
    expected = reference(torch.tensor(x).movedim(-1, 1)).movedim(1, -1).detach().numpy()
    np.testing.assert_allclose(GroupNorm(3, 1e-2).apply({"params": params}, x), expected, atol=2e-5)


def test_every_dimension_of_a_kernel_has_a_name_of_the_table():
    boxed = Conv2D(6).init(jax.random.key(0), X)["params"]
    assert boxed["kernel"].names == (None, None, "channels", "embed") and boxed["bias"].names == ("embed",)
    assert set(boxed["kernel"].names) - {None} <= set(RULES)
