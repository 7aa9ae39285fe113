"""Linear maps with activations between them: the projectors of LLaVA and LLaVA-1.5 (arXiv 2304.08485, 2310.03744).

LLaVA has one map and LLaVA-1.5 has two. InternVL's merging of neighbouring patches may precede them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
from einops import rearrange
from flax import linen as nn

from mllm_jax.errors import ConfigError
from mllm_jax.layers.compute import WithCompute
from mllm_jax.layers.linear import Linear
from mllm_jax.layers.mlp import ACTIVATIONS
from mllm_jax.layers.norms import LayerNorm
from mllm_jax.layers.requirements import Requirements


def merged_tokens(grid: int, factor: int, what: str) -> int:
    """Returns the media tokens of grid x grid patches if each square of factor x factor patches becomes one.

    Raises:
        ConfigError: the factor does not divide the grid.
    """
    if grid % factor:
        raise ConfigError(
            f"{what} of {factor} x {factor} patches on a grid of {grid} x {grid}",
            "a side that the factor divides",
            "change the encoder's image_size or patch_size, or the factor",
        )
    return (grid // factor) ** 2


@dataclass(frozen=True)
class MLPProjectorConfig(WithCompute):
    """Linear maps with an activation between each two.

    Attributes:
        output_size: width of a media token; None takes the LLM's hidden size.
        hidden_size: width of all maps but the last; None is output_size.
        num_layers: number of linear maps; 1 is a linear projector.
        merge: side of the square of patches that becomes one media token (pixel shuffle, arXiv 2404.16821); 1 is none.
        input_norm: whether a LayerNorm precedes the maps.
        place_embedding: whether to add a learned vector for each media token's position in the image. An encoder may
            give the same features at every position, and the LLM's positions depend on the text before the image.
    """

    output_size: int | None = None
    hidden_size: int | None = None
    merge: int = 1
    activation: str = "gelu"
    input_norm: bool = False
    place_embedding: bool = False
    num_layers: int = 2
    use_bias: bool = True

    def __post_init__(self):
        require = Requirements("MLP projector", self)
        require(self.num_layers >= 1, f"{self.num_layers} linear maps", "at least one", "change num_layers")
        require.one_of("activation", ACTIVATIONS)

    @property
    def pointwise(self) -> bool:
        """A flag: each input vector, class tokens included, becomes one media token."""
        return self.merge == 1

    @property
    def needs_grid(self) -> bool:
        """A flag: the input must be a square grid of patches without other vectors."""
        return self.merge > 1

    def num_tokens(self, grid: int) -> int:
        """Returns the media tokens of grid x grid patches. Raises ConfigError: `merge` does not divide the grid."""
        if grid % self.merge:
            raise ConfigError(
                f"projector.merge {self.merge} on {grid} patches a side",
                "a merge that divides the patches",
                "change projector.merge, encoder.image_size or encoder.patch_size",
            )
        return (grid // self.merge) ** 2

    def length(self, vectors: int) -> int:
        """Returns the media tokens of a sequence, such as a sound's; also of an integer array of lengths.

        Raises:
            ConfigError: `merge`, which needs a grid.
        """
        Requirements("MLP projector", self)(
            self.merge == 1, f"merge {self.merge} of a sequence", "1: it has no squares", "take StackedProjectorConfig"
        )
        return vectors

    def make(self) -> MLPProjector:
        Requirements("MLP projector", self).given("output_size")
        return MLPProjector(self)


def mlp_after(config: Any, **more: Any) -> MLPProjectorConfig:
    """Returns the config of the MLP of a projector that first brings vectors together, from its fields of equal names.

    Args:
        more: further fields of the MLP.
    """
    names = ("output_size", "hidden_size", "num_layers", "activation", "use_bias", "compute")
    return MLPProjectorConfig(**{name: getattr(config, name) for name in names}, **more)


class MLPProjector(nn.Module):
    """MLP from encoder features to LLM embeddings."""

    config: MLPProjectorConfig

    @nn.compact
    def __call__(self, features):
        """Maps dtype[B, h*w, E] of a square grid to dtype[B, h*w/merge^2, output_size]."""
        c = self.config
        dtype = jnp.dtype(c.dtype)
        x = features
        if c.merge > 1:
            side = round(features.shape[1] ** 0.5) // c.merge
            x = rearrange(x, "b (h p w q) e -> b (h w) (p q e)", h=side, w=side, p=c.merge, q=c.merge)
        if c.input_norm:
            x = LayerNorm(1e-6, dtype, name="norm")(x)
        for layer in range(1, c.num_layers + 1):
            last = layer == c.num_layers
            size = c.output_size if last else c.hidden_size or c.output_size
            between = ("mlp", "channels")[layer % 2], "embed" if last else ("channels", "mlp")[layer % 2]
            x = Linear((size,), between, use_bias=c.use_bias, dtype=dtype, name=f"linear_{layer}")(x)
            x = x if last else ACTIVATIONS[c.activation](x)
        if c.place_embedding:
            init = nn.with_logical_partitioning(nn.initializers.normal(0.3), ("patches", "embed"))
            x = x + self.param("place_embedding", init, x.shape[1:], jnp.float32).astype(dtype)
        return x
