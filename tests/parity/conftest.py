"""Fixtures for parity tests: random torch weights far from all defaults, and comparisons."""

from __future__ import annotations

import jax
import numpy as np
import pytest
import torch

torch.set_num_threads(1)


@pytest.fixture(scope="session")
def randomise():
    """Fills every parameter of a torch module, biases and norms included, with numbers far from their defaults."""

    def fill(module: torch.nn.Module, seed: int = 0) -> torch.nn.Module:
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for name, parameter in module.named_parameters():
                noise = torch.randn(parameter.shape, generator=generator)
                if parameter.ndim == 1:
                    # A norm's scale stays away from 0; a bias need not.
                    parameter.copy_(0.3 * noise + (1.0 if "norm" in name and name.endswith("weight") else 0.0))
                elif "embed_tokens" in name or "position" in name or "cls" in name:
                    parameter.copy_(0.7 * noise)
                else:
                    parameter.copy_(1.5 * noise / parameter[0].numel() ** 0.5)
        return module.eval()

    return fill


@pytest.fixture(scope="session")
def to_numpy():
    """Converts the torch tensors of a dict to float32 arrays."""

    def convert(tensors: dict) -> dict[str, np.ndarray]:
        return {name: tensor.detach().numpy().copy() for name, tensor in tensors.items()}

    return convert


@pytest.fixture(scope="session")
def assert_close():
    """Checks the largest difference of two arrays, relative to the largest value."""

    def check(ours, theirs, tolerance: float, what: str = "") -> None:
        ours, theirs = np.asarray(ours, np.float64), np.asarray(theirs, np.float64)
        assert ours.shape == theirs.shape, (what, ours.shape, theirs.shape)
        scale = np.abs(theirs).max()
        assert scale > 1e-6, f"{what}: the reference is zero, which proves nothing"
        error = np.abs(ours - theirs).max() / scale
        assert error <= tolerance, f"{what}: relative error {error:.2e} above {tolerance:.0e}"

    return check


@pytest.fixture(scope="session")
def assert_same_tree():
    """Checks that mapped weights have exactly the leaves and shapes of the module."""

    def check(params, abstract) -> None:
        shapes = jax.tree.map(lambda x: tuple(x.shape), params)
        wanted = jax.tree.map(lambda x: tuple(x.shape), abstract)
        assert shapes == wanted

    return check
