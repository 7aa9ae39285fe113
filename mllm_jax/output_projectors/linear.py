"""A linear map of each signal token's state: the simplest output projector of the survey (arXiv 2401.13601).

With as many signals as vectors of the condition it is GILL's "linear" mode (arXiv 2305.17216). With fewer, each signal
gives several neighbouring vectors.
"""

from __future__ import annotations

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from einops import rearrange
from flax import linen as nn

from mllm_jax.layers.linear import Linear
from mllm_jax.layers.requirements import Requirements
from mllm_jax.output_projectors.protocol import TokensToCondition
from mllm_jax.sharding.logical import constrain


@dataclass(frozen=True)
class LinearOutputProjectorConfig(TokensToCondition):
    """Sizes of a linear output projector.

    Attributes:
        output_tokens: n, the number of vectors of the condition. Each of the N states gives `share` of them, in order,
            and the first n are kept.
    """

    output_tokens: int = 77
    use_bias: bool = True

    @property
    def share(self) -> int:
        """The number of vectors that each state gives: n / N, rounded up."""
        return -(-self.output_tokens // self.tokens)

    def output_mask(self, mask: jax.Array | None) -> jax.Array | None:
        """Returns bool[B, output_tokens], False at vectors of a state that does not count; None without a mask."""
        return None if mask is None else jnp.repeat(mask, self.share, axis=1)[:, : self.output_tokens].astype(bool)

    def make(self) -> LinearOutputProjector:
        Requirements("linear output projector", self).given("input_size")
        return LinearOutputProjector(self)


class LinearOutputProjector(nn.Module):
    """Linear map from the states of signal tokens to a generator's condition."""

    config: LinearOutputProjectorConfig

    @nn.compact
    def __call__(self, states, embeddings=None, mask=None):
        """Maps dtype[B, N, E] to dtype[B, output_tokens, output_size], 0 for states that do not count.

        Args:
            embeddings: not read.
            mask: bool[B, N] or None.

        Raises:
            DataError: states of another shape.
        """
        self.config.check(states, embeddings)
        return give_vectors(self.config, states, mask, "embed")


def give_vectors(config: LinearOutputProjectorConfig, x: jax.Array, mask: jax.Array | None, axis: str) -> jax.Array:
    """Applies the last map of a projector whose states each give `config.share` vectors, inside its module.

    Args:
        x: dtype[B, N, F].
        axis: logical name of x's last dimension.
    """
    sizes, names = (config.share, config.output_size), (axis, None, "channels")
    x = Linear(sizes, names, use_bias=config.use_bias, dtype=jnp.dtype(config.dtype), name="out")(x)
    x = rearrange(x, "b n r d -> b (n r) d")[:, : config.output_tokens]
    kept = config.output_mask(mask)
    x = x if kept is None else jnp.where(kept[..., None], x, 0)
    return constrain(x, "batch", "queries", None)
