"""Several output projectors of the same tokens, for a generator with several conditions: AudioLDM-2.

AudioLDM-2's UNet (arXiv 2308.05734) reads two conditions, and these are the targets of an output projector for it:

1. 8 x 768: the vectors that its GPT-2 rolls out from CLAP's and Flan-T5's states of the caption. They are as many for
   every caption.
2. n x 1024: Flan-T5's states of the caption, whose number is that of the caption's tokens. `fill_positions` repeats
   them evenly to n vectors, so that every vector of the prediction has a target and none is padding. The UNet's
   cross-attention has no positions: it reads repeated states as it reads them once.

    SeveralConditionsConfig(tokens=8, projectors=(
        TransformerMapperConfig(tokens=8, output_tokens=8, output_size=768),
        TransformerMapperConfig(tokens=8, output_tokens=32, output_size=1024),
    ))
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import jax
import jax.numpy as jnp
from flax import linen as nn

from mllm_jax.layers.compute import WithCompute, within
from mllm_jax.layers.requirements import Requirements
from mllm_jax.output_projectors.protocol import OutputProjectorConfig


@dataclass(frozen=True)
class SeveralConditionsConfig(WithCompute):
    """Output projectors that read the same tokens, each with its own condition.

    Attributes:
        tokens: number of signal or query tokens, equal to that of every projector.
        input_size: width of their states, for every projector that leaves it open; None takes the LLM's hidden size.
        projectors: in the order of the generator's conditions.
    """

    projectors: tuple[OutputProjectorConfig, ...]
    tokens: int = 8
    input_size: int | None = None

    def __post_init__(self):
        require = Requirements("several conditions", self)
        require(bool(self.projectors), "no projectors", "at least one", "change projectors")
        tokens = [each.tokens for each in self.projectors]
        require(
            set(tokens) == {self.tokens},
            f"projectors of {tokens} tokens for {self.tokens}",
            "the same number for all: they read the same tokens",
            "change tokens",
        )

    @property
    def output_tokens(self) -> tuple[int, ...]:
        """The number of vectors of each condition."""
        return tuple(each.output_tokens for each in self.projectors)

    @property
    def output_size(self) -> tuple[int, ...]:
        """The width of each condition."""
        return tuple(each.output_size for each in self.projectors)

    @property
    def reads_embeddings(self) -> bool:
        """A flag: some projector needs the embeddings of the tokens."""
        return any(each.reads_embeddings for each in self.projectors)

    def output_mask(self, mask: jax.Array | None) -> tuple[jax.Array | None, ...]:
        """Returns the mask of each condition."""
        return tuple(each.output_mask(mask) for each in self.projectors)

    def make(self) -> SeveralConditions:
        Requirements("several conditions", self).given("input_size")
        return SeveralConditions(self)


class SeveralConditions(nn.Module):
    """Output projectors of the same tokens, `condition_0`, `condition_1`, ..."""

    config: SeveralConditionsConfig

    def setup(self):
        c = self.config
        parts = [each if each.input_size else replace(each, input_size=c.input_size) for each in c.projectors]
        self.condition = [within(part, c.compute).make() for part in parts]

    def __call__(self, states, embeddings=None, mask=None):
        """Maps dtype[B, N, E] to a tuple of conditions dtype[B, n, d]; see `OutputProjectorConfig`."""
        return tuple(projector(states, embeddings, mask) for projector in self.condition)


def fill_positions(states: jax.Array, mask: jax.Array, size: int) -> jax.Array:
    """Repeats the states of each text evenly, in their order, so that they fill `size` positions.

    Attention without positions reads them as it reads each state once, exactly if their number divides `size`. A text
    of more than `size` states keeps `size` of them at even distances.

    Args:
        states: dtype[B, L, D].
        mask: bool[B, L], False at padding, which follows the text; at least one True a row.

    Returns:
        dtype[B, size, D].
    """
    lengths = mask.astype(jnp.int32).sum(axis=1, keepdims=True)
    index = jnp.arange(size) * lengths // size
    return jnp.take_along_axis(states, index[..., None], axis=1)
