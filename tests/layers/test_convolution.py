"""Convolutions in groups on a CPU and on other platforms, and the convolution that adds positions."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from mllm_jax.layers.convolution import PositionalConvolution, convolve

AXES = {1: ("NWC", "WIO", "NWC"), 2: ("NHWC", "HWIO", "NHWC")}


@pytest.mark.parametrize("padding", ("SAME", "even", "VALID"))
@pytest.mark.parametrize("dimensions", (1, 2))
def test_group_by_group_on_a_cpu_equals_one_grouped_convolution(dimensions, padding):
    rng = np.random.default_rng(3)
    x = rng.normal(size=(2, *(9, 6)[:dimensions], 12)).astype(np.float32)
    kernel = rng.normal(size=(*(3, 3)[:dimensions], 4, 15)).astype(np.float32)
    padding = ((1, 1),) * dimensions if padding == "even" else padding

    def grouped(x, kernel):
        return jax.lax.conv_general_dilated(
            x, kernel, (2,) * dimensions, padding, dimension_numbers=AXES[dimensions], feature_group_count=3
        )

    def ours(x, kernel):
        return convolve(x, kernel, 2, padding, 3)

    def graded(convolve):
        return jax.value_and_grad(lambda *args: jnp.square(convolve(*args)).sum(), (0, 1))(x, kernel)

    np.testing.assert_allclose(ours(x, kernel), grouped(x, kernel), atol=1e-4)
    for mine, other in zip(jax.tree.leaves(graded(ours)), jax.tree.leaves(graded(grouped)), strict=True):
        np.testing.assert_allclose(mine, other, rtol=1e-4, atol=1e-3)
    for platform, convolutions in (("cpu", 3), ("tpu", 1), ("cuda", 1)):
        text = jax.jit(ours).trace(x, kernel).lower(lowering_platforms=(platform,)).as_text()
        assert text.count("stablehlo.convolution") == convolutions, platform
        assert f"feature_group_count = {3 if convolutions == 1 else 1} : i64" in text, platform


def test_at_the_start_the_kernel_of_positions_is_its_direction():
    """Checks that the learned lengths begin as those of the directions, as torch's weight norm does."""
    module = PositionalConvolution(5, 2)
    params = nn.meta.unbox(module.init(jax.random.key(0), jnp.zeros((1, 3, 8))))["params"]
    lengths = np.sqrt(np.square(params["direction"]).sum(axis=(1, 2)))
    np.testing.assert_allclose(params["length"], lengths, rtol=1e-6)
    longer = params | dict(direction=3 * params["direction"])
    x = jax.random.normal(jax.random.key(1), (1, 7, 8))
    np.testing.assert_allclose(
        module.apply({"params": longer}, x), module.apply({"params": params}, x), rtol=1e-5, atol=1e-6
    )
