"""A C-Former as the projector of a composed model: one media token for each word or so (X-LLM, arXiv 2305.04160).

It is beside neither the encoders nor the projectors, which do not import each other: it is the encoder `CFormer` in the
role of `Branch.projector`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from mllm_jax.encoders.cformer import CFormer, CFormerConfig
from mllm_jax.layers.requirements import Requirements


@dataclass(frozen=True)
class CFormerProjectorConfig(CFormerConfig):
    """The config of a C-Former after a speech encoder; for the other fields see `CFormerConfig`.

    The number of media tokens of a sound depends on what is said. A row has a position for each of the most that there
    may be, `length(vectors)`: one for each `factor` vectors. Positions without a token are hidden, see
    `mllm_jax.models.hidden`. A sound that fires more often loses its last tokens; the objective `QuantityGuided`
    reports their share as `cut`.

    Attributes:
        input_size: width of the speech encoder's vectors; None takes the encoder's.
        factor: the least number of vectors for one media token. An encoder with 50 vectors a second and a factor of 8
            gives at most 6.25 media tokens a second.
        max_fires: the most media tokens of a slot; None: only `factor` bounds them.
    """

    input_size: int | None = None
    factor: int = 8
    family: str | None = None

    fires = True  # the module returns FiredTokens
    pointwise = False  # several vectors become one media token

    def __post_init__(self):
        super().__post_init__()
        require = Requirements("C-Former", self)
        require(self.factor >= 1, f"factor {self.factor}", "1 or more vectors for a media token", "change factor")

    def length(self, vectors: Any) -> Any:
        """Returns the most media tokens of a sequence; also of an integer array of lengths.

        Raises:
            ConfigError: more than the transformer has positions.
        """
        most = self.frames(-(-vectors // self.factor))
        Requirements("C-Former", self)(
            np.max(most, initial=0) <= self.max_length,
            f"up to {np.max(most, initial=0)} media tokens of a slot",
            f"at most {self.max_length}, the positions of its transformer",
            "raise factor, set max_fires, or lower the branch's seconds",
        )
        return most

    def num_tokens(self, grid: int) -> int:
        """Returns the most media tokens of grid x grid patches."""
        return self.length(grid**2)

    def make(self) -> CFormerProjector:
        Requirements("C-Former", self).given("output_size", "input_size")
        return CFormerProjector(self)


@struct.dataclass
class FiredTokens:
    """The media tokens of a batch of sounds.

    Attributes:
        tokens: dtype[B, N, E].
        mask: bool[B, N], True for fired tokens, which come first.
        fires: int32[B], the number of fires; larger than the number of tokens if the bound cut some.
        quantity: float32[B], the sum of the unscaled weights, see `mllm_jax.encoders.cformer.quantity_loss`.
    """

    tokens: jax.Array
    mask: jax.Array
    fires: jax.Array
    quantity: jax.Array


class CFormerProjector(CFormer):
    """Projector from a speech encoder's vectors to a number of LLM embeddings that the vectors decide."""

    config: CFormerProjectorConfig

    def __call__(self, features, mask=None, target_lengths=None) -> FiredTokens:
        """Maps dtype[B, T, input_size] to at most `config.length(T)` media tokens.

        The tail of a sound fires whether or not its slot is full, unlike the tail of the longest sound of a batch in
        the reference.

        Args:
            mask: [B, T], 1 for valid vectors, which come before the others; None: all are valid.
            target_lengths: for training: float[B], the numbers of tokens to which the weights are scaled, see `cif`; 0
                leaves them as they are. The tail does not fire.
        """
        c, size = self.config, features.shape[1]
        valid = jnp.ones(features.shape[:2], bool) if mask is None else mask != 0
        # The tail fires at the first padded vector: a full slot needs one.
        features, valid = jnp.pad(features, ((0, 0), (0, 1), (0, 0))), jnp.pad(valid, ((0, 0), (0, 1)))
        if target_lengths is not None:
            unscaled = jnp.where(valid, self.weigh(features), 0).sum(axis=1)
            target_lengths = jnp.where(target_lengths > 0, target_lengths, unscaled)
        fired = self.fire(features, valid, target_lengths)
        most = c.length(size)
        allowed = -(-valid.sum(axis=1) // c.factor)
        kept = fired.mask[:, :most] & (jnp.arange(most) < allowed[:, None])
        vectors = jnp.where(kept[..., None], fired.vectors[:, :most], 0)
        out = self.transform(vectors, kept)
        return FiredTokens(out.last_hidden_state, kept, fired.fires, fired.quantity)
