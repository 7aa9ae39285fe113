"""InternVL's projector (arXiv 2404.16821, section 3.1): pixel shuffle, LayerNorm, Linear, GELU, Linear."""

from __future__ import annotations

import math
from dataclasses import dataclass

import jax.numpy as jnp
from einops import rearrange
from flax import linen as nn

from mllm_jax.layers.compute import WithCompute
from mllm_jax.layers.linear import Linear
from mllm_jax.layers.mlp import ACTIVATIONS
from mllm_jax.layers.norms import LayerNorm
from mllm_jax.layers.requirements import Requirements
from mllm_jax.projectors.mlp import merged_tokens

VERSIONS = ("v1", "v2")


def pixel_shuffle(x, factor: int, version: str = "v2"):
    """Concatenates each square of factor x factor vectors into one, row by row.

    Args:
        x: [B, H, W, E].
        version: "v2" keeps rows and columns; "v1", the first OpenGVLab code, swaps them.

    Returns:
        v2: [B, H/factor, W/factor, factor^2 * E]; v1: [B, W/factor, H/factor, factor^2 * E].
    """
    order = "w h" if version == "v1" else "h w"
    return rearrange(x, f"b (h p) (w q) e -> b {order} (p q e)", p=factor, q=factor)


@dataclass(frozen=True)
class PixelShuffleProjectorConfig(WithCompute):
    """Sizes of the projector and the version of the shuffle.

    Attributes:
        output_size: width of a media token and of the hidden layer; None takes the LLM's hidden size.
        factor: side of the square of patches that becomes one media token; 1 / `downsample_ratio`.
        version: "v1" or "v2", see `pixel_shuffle`.
    """

    output_size: int | None = None
    factor: int = 2
    version: str = "v2"
    activation: str = "gelu"
    norm_eps: float = 1e-5

    pointwise = False  # several vectors become one media token
    needs_grid = True  # the input has no class token

    def __post_init__(self):
        require = Requirements("pixel shuffle", self)
        require.one_of("version", VERSIONS)
        require.one_of("activation", ACTIVATIONS)
        require(self.factor >= 1, f"factor {self.factor}", "1 or more patches a side", "change factor")

    def num_tokens(self, grid: int) -> int:
        """Returns the media tokens of grid x grid patches, see `merged_tokens`."""
        return merged_tokens(grid, self.factor, "pixel shuffle")

    def make(self) -> PixelShuffleProjector:
        Requirements("pixel shuffle", self).given("output_size")
        return PixelShuffleProjector(self)


class PixelShuffleProjector(nn.Module):
    """Projector from encoder features to LLM embeddings (reference: `pixel_shuffle`, `InternVLMultiModalProjector`)."""

    config: PixelShuffleProjectorConfig

    @nn.compact
    def __call__(self, features):
        """Maps dtype[B, h*w, E] of a square grid to dtype[B, h*w/factor^2, output_size]."""
        c = self.config
        dtype = jnp.dtype(c.dtype)
        c.num_tokens(side := math.isqrt(features.shape[1]))  # refuses a grid that does not fit
        x = pixel_shuffle(rearrange(features, "b (h w) e -> b h w e", h=side), c.factor, c.version)
        x = LayerNorm(c.norm_eps, dtype, axis="channels", name="norm")(rearrange(x, "b h w e -> b (h w) e"))
        wide = dict(features=(c.output_size,), use_bias=True, dtype=dtype)
        x = ACTIVATIONS[c.activation](Linear(names=("channels", "mlp"), **wide, name="linear_1")(x))
        return Linear(names=("mlp", "embed"), **wide, name="linear_2")(x)
