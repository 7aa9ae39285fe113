"""An MLP of each signal token's state: the survey's second baseline among output projectors (arXiv 2401.13601)."""

from __future__ import annotations

from dataclasses import dataclass

import jax.numpy as jnp
from flax import linen as nn

from mllm_jax.layers.linear import Linear
from mllm_jax.layers.mlp import ACTIVATIONS
from mllm_jax.layers.requirements import Requirements
from mllm_jax.output_projectors.linear import LinearOutputProjectorConfig, give_vectors


@dataclass(frozen=True)
class MLPOutputProjectorConfig(LinearOutputProjectorConfig):
    """Sizes of an MLP; each state gives `share` vectors of the condition, as in `LinearOutputProjectorConfig`.

    Attributes:
        hidden_size: width of all maps but the last.
        num_layers: number of linear maps, with an activation between each two.
    """

    hidden_size: int = 512
    num_layers: int = 2
    activation: str = "gelu"

    def __post_init__(self):
        super().__post_init__()
        require = Requirements("MLP output projector", self)
        require(
            self.num_layers >= 2 and self.hidden_size >= 1,
            f"{self.num_layers} linear maps of width {self.hidden_size}",
            "at least two maps, and a width of at least 1",
            "change num_layers or hidden_size, or take LinearOutputProjectorConfig for one map",
        )
        require.one_of("activation", ACTIVATIONS)

    def make(self) -> MLPOutputProjector:
        Requirements("MLP output projector", self).given("input_size")
        return MLPOutputProjector(self)


class MLPOutputProjector(nn.Module):
    """MLP from the states of signal tokens to a generator's condition."""

    config: MLPOutputProjectorConfig

    @nn.compact
    def __call__(self, states, embeddings=None, mask=None):
        """Maps dtype[B, N, E] to dtype[B, output_tokens, output_size], 0 for states that do not count.

        Args:
            embeddings: not read.
            mask: bool[B, N] or None.

        Raises:
            DataError: states of another shape.
        """
        c, x = self.config, states
        c.check(states, embeddings)
        axes = ("embed", "mlp")
        for layer in range(1, c.num_layers):
            names, dtype = (axes[(layer - 1) % 2], axes[layer % 2]), jnp.dtype(c.dtype)
            x = Linear((c.hidden_size,), names, use_bias=c.use_bias, dtype=dtype, name=f"linear_{layer}")(x)
            x = ACTIVATIONS[c.activation](x)
        return give_vectors(c, x, mask, axes[(c.num_layers - 1) % 2])
