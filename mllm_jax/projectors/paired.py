"""DeepSeek-VL's projector of two encoders' features (arXiv 2403.05525, section 2.1)."""

from __future__ import annotations

from dataclasses import dataclass

import jax.numpy as jnp
from flax import linen as nn

from mllm_jax.layers.compute import WithCompute
from mllm_jax.layers.linear import Linear
from mllm_jax.layers.mlp import ACTIVATIONS
from mllm_jax.layers.requirements import Requirements


@dataclass(frozen=True)
class PairedProjectorConfig(WithCompute):
    """Each encoder's numbers by a linear map of their own to half the width, side by side, activation, Linear.

    Attributes:
        output_size: None: the LLM's hidden size, an even number.
        widths: how many numbers of each vector are the first encoder's, and how many the second's; None: as the
            encoder has them.
    """

    output_size: int | None = None
    widths: tuple[int, int] | None = None
    activation: str = "gelu"

    pointwise = True  # each vector that comes in becomes one media token

    def __post_init__(self):
        require = Requirements("paired projector", self)
        require(
            self.output_size is None or self.output_size % 2 == 0,
            f"output_size {self.output_size}",
            "an even number: each encoder has half of it",
            "change output_size",
        )
        require.one_of("activation", ACTIVATIONS)

    def num_tokens(self, grid: int) -> int:
        """Media tokens of a square picture of grid x grid patches."""
        return grid**2

    def make(self) -> PairedProjector:
        Requirements("paired projector", self).given("output_size", "widths")
        return PairedProjector(self)


class PairedProjector(nn.Module):
    """Two encoders' features to LLM embeddings (reference: `DeepseekVLHybridAligner`)."""

    config: PairedProjectorConfig

    @nn.compact
    def __call__(self, features):
        """dtype[B, N, sum(widths)] -> dtype[B, N, output_size]"""
        c = self.config
        dtype = jnp.dtype(c.dtype)
        first, second = jnp.split(features, [c.widths[0]], axis=-1)
        half = dict(features=(c.output_size // 2,), names=("channels", "mlp"), use_bias=True, dtype=dtype)
        parts = [Linear(**half, name="first")(first), Linear(**half, name="second")(second)]
        x = ACTIVATIONS[c.activation](jnp.concatenate(parts, axis=-1))
        return Linear((c.output_size,), ("mlp", "embed"), use_bias=True, dtype=dtype, name="out")(x)
