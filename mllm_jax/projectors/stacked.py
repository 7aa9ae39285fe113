"""Neighbouring vectors of a sequence, concatenated, and an MLP: the projector of speech encoders (arXiv 2402.08846).

An encoder of sound has many more vectors a second than its words have tokens: 50 for Whisper and HuBERT.
"""

from __future__ import annotations

from dataclasses import dataclass

import jax.numpy as jnp
from einops import rearrange
from flax import linen as nn

from mllm_jax.layers.compute import WithCompute
from mllm_jax.layers.requirements import Requirements
from mllm_jax.projectors.mlp import MLPProjector, MLPProjectorConfig, mlp_after


@dataclass(frozen=True)
class StackedProjectorConfig(WithCompute):
    """Sizes of the groups and of the MLP after them.

    Attributes:
        output_size: width of a media token; None takes the LLM's hidden size.
        factor: number of neighbouring vectors that become one media token; zeros fill the last group.
        hidden_size, num_layers, activation, input_norm, use_bias: of the MLP, see `MLPProjectorConfig`.
    """

    output_size: int | None = None
    factor: int = 5
    hidden_size: int | None = 2048
    num_layers: int = 2
    activation: str = "relu"
    input_norm: bool = False
    use_bias: bool = True

    pointwise = False  # several vectors become one media token

    def __post_init__(self):
        require = Requirements("stacked projector", self)
        require(self.factor >= 1, f"factor {self.factor}", "1 or more vectors for a media token", "change factor")
        self.mlp  # noqa: B018 - checks the MLP's fields

    @property
    def mlp(self) -> MLPProjectorConfig:
        """The config of the MLP after the concatenation."""
        return mlp_after(self, input_norm=self.input_norm)

    def num_tokens(self, grid: int) -> int:
        """Returns the media tokens of grid x grid patches."""
        return self.length(grid**2)

    def length(self, vectors: int) -> int:
        """Returns the media tokens of a sequence; also of an integer array of lengths."""
        return -(-vectors // self.factor)

    def make(self) -> StackedProjector:
        Requirements("stacked projector", self).given("output_size")
        return StackedProjector(self)


class StackedProjector(nn.Module):
    """Projector from a sequence of encoder features to fewer LLM embeddings."""

    config: StackedProjectorConfig

    @nn.compact
    def __call__(self, features):
        """Maps dtype[B, T, E] to dtype[B, ceil(T / factor), output_size]."""
        c = self.config
        missing = -features.shape[1] % c.factor
        padded = jnp.pad(features, [(0, 0), (0, missing), (0, 0)])
        x = rearrange(padded, "b (t f) e -> b t (f e)", f=c.factor)
        return MLPProjector(c.mlp, name="mlp")(x)
