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
    """A linear map of each encoder's features to half the width, concatenation, activation, Linear.

    Attributes:
        output_size: width of a media token, an even number; None takes the LLM's hidden size.
        widths: feature sizes of the first and of the second encoder; None takes them from the encoder.
    """

    output_size: int | None = None
    widths: tuple[int, int] | None = None
    activation: str = "gelu"

    pointwise = True  # each input vector becomes one media token

    def __post_init__(self):
        require = Requirements("paired projector", self)
        require(
            self.output_size is None or self.output_size % 2 == 0,
            f"output_size {self.output_size}",
            "an even number: each encoder fills half of it",
            "change output_size",
        )
        require.one_of("activation", ACTIVATIONS)

    def num_tokens(self, grid: int) -> int:
        """Returns the media tokens of an image of grid x grid patches."""
        return grid**2

    def make(self) -> PairedProjector:
        Requirements("paired projector", self).given("output_size", "widths")
        return PairedProjector(self)


class PairedProjector(nn.Module):
    """Projector from two encoders' features to LLM embeddings (reference: `DeepseekVLHybridAligner`)."""

    config: PairedProjectorConfig

    @nn.compact
    def __call__(self, features):
        """Maps dtype[B, N, sum(widths)] to dtype[B, N, output_size]."""
        c = self.config
        dtype = jnp.dtype(c.dtype)
        first, second = jnp.split(features, [c.widths[0]], axis=-1)
        half = dict(features=(c.output_size // 2,), names=("channels", "mlp"), use_bias=True, dtype=dtype)
        parts = [Linear(**half, name="first")(first), Linear(**half, name="second")(second)]
        x = ACTIVATIONS[c.activation](jnp.concatenate(parts, axis=-1))
        return Linear((c.output_size,), ("mlp", "embed"), use_bias=True, dtype=dtype, name="out")(x)
