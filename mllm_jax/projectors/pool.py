"""Average pooling of the grid of patches, then an MLP: LLaVA-NeXT-Video's projector of a frame.

`MLPProjectorConfig.merge` concatenates neighbouring patches instead of averaging them.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from einops import reduce
from flax import linen as nn

from mllm_jax.errors import ConfigError
from mllm_jax.layers.compute import WithCompute
from mllm_jax.layers.requirements import Requirements
from mllm_jax.projectors.mlp import MLPProjector, MLPProjectorConfig, merged_tokens, mlp_after


@dataclass(frozen=True)
class PoolProjectorConfig(WithCompute):
    """Sizes of the pooling and of the MLP after it.

    Attributes:
        output_size: width of a media token; None takes the LLM's hidden size.
        factor: side of the square of patches whose mean becomes one media token.
        hidden_size, num_layers, activation, use_bias: of the MLP, see `MLPProjectorConfig`.
    """

    output_size: int | None = None
    factor: int = 2
    hidden_size: int | None = None
    num_layers: int = 2
    activation: str = "gelu"
    use_bias: bool = True

    pointwise = False  # several vectors become one media token
    needs_grid = True  # the input has no class token

    def __post_init__(self):
        require = Requirements("average pooling", self)
        require(self.factor >= 1, f"factor {self.factor}", "1 or more patches a side", "change factor")
        self.mlp  # noqa: B018 - checks the MLP's fields

    @property
    def mlp(self) -> MLPProjectorConfig:
        """The config of the MLP after the pooling."""
        return mlp_after(self)

    def num_tokens(self, grid: int) -> int:
        """Returns the media tokens of grid x grid patches, see `merged_tokens`."""
        return merged_tokens(grid, self.factor, "average pooling")

    def make(self) -> PoolProjector:
        Requirements("average pooling", self).given("output_size")
        return PoolProjector(self)


class PoolProjector(nn.Module):
    """Projector from encoder features to LLM embeddings (reference: `LlavaNextVideoPooler` and its projector)."""

    config: PoolProjectorConfig

    @nn.compact
    def __call__(self, features):
        """Maps dtype[B, h*w, E] of a square grid to dtype[B, h*w/factor^2, output_size].

        Raises:
            ConfigError: a grid that is not square, or whose side the factor does not divide.
        """
        c, (patches, side) = self.config, (features.shape[1], math.isqrt(features.shape[1]))
        if side**2 != patches:
            raise ConfigError(
                f"average pooling of {patches} vectors of an image",
                "a square grid of patches, without a class token",
                "change the connection",
            )
        c.num_tokens(side)  # refuses a grid that does not fit
        x = reduce(features, "b (h p w q) e -> b (h w) e", "mean", h=side // c.factor, p=c.factor, q=c.factor)
        return MLPProjector(c.mlp, name="mlp")(x)
