"""The MLP projector of LLaVA-1.5 (arXiv 2310.03744), with InternVL's merging of neighbouring patches before it."""

from __future__ import annotations

from dataclasses import dataclass

import jax.numpy as jnp
from einops import rearrange
from flax import linen as nn

from mllm_jax.errors import ConfigError
from mllm_jax.layers.linear import Linear
from mllm_jax.layers.mlp import ACTIVATIONS
from mllm_jax.layers.norms import LayerNorm


@dataclass(frozen=True)
class MLPProjectorConfig:
    """Linear, activation, Linear.

    Attributes:
        output_size: the LLM's hidden size.
        hidden_size: None is output_size.
        merge: side of the square of patches that becomes one media token (pixel shuffle, arXiv 2404.16821); 1 is none.
        input_norm: LayerNorm on what comes in.
        place_embedding: a learned vector is added to each media token that tells its place in the picture. Features do
            not tell it where the encoder gives all places one meaning, and the LLM's positions count from the question.
    """

    output_size: int
    hidden_size: int | None = None
    merge: int = 1
    activation: str = "gelu"
    input_norm: bool = False
    place_embedding: bool = False
    dtype: str = "float32"

    @property
    def pointwise(self) -> bool:
        """Whether each vector that comes in goes out by itself, class tokens among them."""
        return self.merge == 1

    def num_tokens(self, grid: int) -> int:
        """Media tokens of a square picture of grid x grid patches. Raises ConfigError: `merge` does not divide it."""
        if grid % self.merge:
            raise ConfigError(
                f"projector.merge {self.merge} on {grid} patches a side",
                "a merge that divides the patches",
                "change projector.merge, encoder.image_size or encoder.patch_size",
            )
        return (grid // self.merge) ** 2

    def make(self) -> MLPProjector:
        return MLPProjector(self)


class MLPProjector(nn.Module):
    """Encoder features to LLM embeddings."""

    config: MLPProjectorConfig

    @nn.compact
    def __call__(self, features):
        """dtype[B, h*w, E] of a square grid -> dtype[B, h*w/merge^2, output_size]"""
        c = self.config
        dtype = jnp.dtype(c.dtype)
        x = features
        if c.merge > 1:
            side = round(features.shape[1] ** 0.5) // c.merge
            x = rearrange(x, "b (h p w q) e -> b (h w) (p q e)", h=side, w=side, p=c.merge, q=c.merge)
        if c.input_norm:
            x = LayerNorm(1e-6, dtype, name="norm")(x)
        x = Linear((c.hidden_size or c.output_size,), ("channels", "mlp"), use_bias=True, dtype=dtype, name="linear_1")(
            x
        )
        x = ACTIVATIONS[c.activation](x)
        x = Linear((c.output_size,), ("mlp", "embed"), use_bias=True, dtype=dtype, name="linear_2")(x)
        if c.place_embedding:
            init = nn.with_logical_partitioning(nn.initializers.normal(0.3), ("patches", "embed"))
            x = x + self.param("place_embedding", init, x.shape[1:], jnp.float32).astype(dtype)
        return x
