"""A linear map of the prompt's own states: Qwen-Image's output projector (arXiv 2508.02324).

There are no signal tokens. The condition is as long as the prompt, and a mask goes with it.
"""

from __future__ import annotations

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from flax import linen as nn

from mllm_jax.layers.linear import Linear
from mllm_jax.layers.norms import RMSNorm
from mllm_jax.layers.requirements import Requirements
from mllm_jax.output_projectors.protocol import TokensToCondition
from mllm_jax.sharding.logical import constrain


@dataclass(frozen=True)
class PromptStatesConfig(TokensToCondition):
    """Sizes of a map of prompts.

    Attributes:
        tokens: the most tokens of a prompt, with its template.
        dropped: number of tokens of the chat template at the start of every prompt, which are left out; 34 in
            Qwen-Image.
        input_norm: whether an RMSNorm precedes the map.
    """

    tokens: int = 1058
    output_size: int = 3072
    dropped: int = 34
    input_norm: bool = True
    norm_eps: float = 1e-6

    def __post_init__(self):
        super().__post_init__()
        require = Requirements("prompt states", self)
        require(self.dropped >= 0, f"dropped {self.dropped}", "at least 0", "change dropped")

    @property
    def output_tokens(self) -> int:
        """The most vectors of a condition."""
        return self.tokens - self.dropped

    def output_mask(self, mask: jax.Array | None) -> jax.Array | None:
        """Returns bool[B, output_tokens]: as many at the start as the prompt has tokens after its template."""
        if mask is None:
            return None
        return jnp.arange(self.output_tokens) < mask.astype(bool).sum(axis=1, keepdims=True) - self.dropped

    def make(self) -> PromptStates:
        Requirements("prompt states", self).given("input_size")
        return PromptStates(self)


class PromptStates(nn.Module):
    """Linear map from a prompt's states, without those of its template, to a generator's condition."""

    config: PromptStatesConfig

    @nn.compact
    def __call__(self, states, embeddings=None, mask=None):
        """Maps dtype[B, N, E] to dtype[B, output_tokens, output_size], 0 where `output_mask` is False.

        Args:
            embeddings: not read.
            mask: bool[B, N], False at padding, which may be on either side; None: no padding.

        Raises:
            DataError: states of another shape.
        """
        c, x, dtype = self.config, states, jnp.dtype(self.config.dtype)
        c.check(states, embeddings)
        if mask is not None:  # the prompt's tokens first, in their order
            x = jnp.take_along_axis(x, jnp.argsort(~mask.astype(bool), axis=1, stable=True)[..., None], axis=1)
        x = x[:, c.dropped :]
        if c.input_norm:
            x = RMSNorm(c.norm_eps, dtype, name="norm")(x)
        x = Linear((c.output_size,), ("embed", "channels"), use_bias=True, dtype=dtype, name="out")(x)
        kept = c.output_mask(mask)
        x = x if kept is None else jnp.where(kept[..., None], x, 0)
        return constrain(x, "batch", "queries", None)
