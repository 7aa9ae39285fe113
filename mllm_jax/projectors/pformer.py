"""The P-Former (arXiv 2307.07063, section 3.2): a caption to the prompts with which an LLM would say it.

A BERT reads the caption; what its first token holds becomes a fixed number of vectors in the LLM's space. It learns
from text alone, and its prompts are then what a picture's media tokens are drawn to.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import jax.numpy as jnp
from flax import linen as nn

from mllm_jax.errors import DataError
from mllm_jax.layers.compute import WithCompute
from mllm_jax.layers.linear import Embedding, Linear
from mllm_jax.layers.mlp import ACTIVATIONS
from mllm_jax.layers.norms import LayerNorm
from mllm_jax.layers.requirements import Requirements
from mllm_jax.layers.stack import layers_of
from mllm_jax.projectors.qformer import INIT_STD, FeedForward, QFormerAttention
from mllm_jax.sharding.logical import constrain


@dataclass(frozen=True)
class PFormerConfig(WithCompute):
    """Sizes of a P-Former; the defaults are BERT-base with 32 prompts.

    Attributes:
        output_size: None: the LLM's hidden size.
        vocab_size: ids that captions are made of, as many as the tokenizer has; None: as many as the LLM has.
        num_queries: prompts of a caption, whatever its length.
        max_length: how many positions a caption may have.
        mask_token_id: the id that stands for a masked token; None: one of its own behind the vocabulary.
    """

    output_size: int | None = None
    vocab_size: int | None = None
    hidden_size: int = 768
    num_layers: int = 12
    num_heads: int = 12
    mlp_size: int = 3072
    num_queries: int = 32
    activation: str = "gelu"
    norm_eps: float = 1e-12
    max_length: int = 512
    mask_token_id: int | None = None

    def __post_init__(self):
        require = Requirements("P-Former", self)
        require.one_of("activation", ACTIVATIONS)
        require.heads()
        require(self.num_queries > 0, f"{self.num_queries} prompts", "at least one", "change num_queries")
        require(
            None in (self.mask_token_id, self.vocab_size) or 0 <= self.mask_token_id < self.vocab_size,
            f"mask_token_id {self.mask_token_id} in a vocabulary of {self.vocab_size}",
            "one of its ids, or None for one of its own",
            "change mask_token_id",
        )

    @property
    def mask_id(self) -> int:
        """What stands in the place of a masked token."""
        return self.vocab_size if self.mask_token_id is None else self.mask_token_id

    def beside(self, llm: Any) -> PFormerConfig:
        """Returns the config with what it leaves open taken from the LLM that it prompts."""
        known = {"output_size": llm.hidden_size, "vocab_size": llm.vocab_size}
        return replace(self, **{name: value for name, value in known.items() if getattr(self, name) is None})

    def make(self) -> PFormer:
        Requirements("P-Former", self).given("output_size", "vocab_size")
        return PFormer(self)


class PFormerLayer(nn.Module):
    """A layer of BERT: attention and MLP, a sum and a norm behind each."""

    config: PFormerConfig

    @nn.compact
    def __call__(self, x, _, segments):
        """x dtype[N, L, E], segments int[N, L] with 0 at what nobody may see."""
        x, _ = QFormerAttention(self.config, name="attention")(x, x, k_segments=segments)
        return constrain(FeedForward(self.config, name="text_mlp")(x), "batch", "seq", None), None


class PFormer(nn.Module):
    """Captions to prompts."""

    config: PFormerConfig

    def setup(self):
        c = self.config
        dtype = jnp.dtype(c.dtype)
        common = dict(use_bias=True, init_std=INIT_STD, dtype=dtype)
        self.token_embedding = Embedding(max(c.vocab_size, c.mask_id + 1), c.hidden_size, dtype=dtype)
        # BERT's vector of the first of two texts is the same everywhere: these hold it.
        self.position_embedding = Embedding(c.max_length, c.hidden_size, names=(None, "embed"), dtype=dtype)
        self.embedding_norm = LayerNorm(c.norm_eps, dtype)
        self.layers = layers_of(c, PFormerLayer, 1)(c)
        self.prompt_projection = Linear((c.num_queries, c.hidden_size), ("embed", "queries", "channels"), **common)
        self.prompt_dense = Linear((c.hidden_size,), ("embed", "channels"), **common)
        self.language_projection = Linear((c.output_size,), ("channels", "embed"), **common)

    def __call__(self, tokens, segments=None):
        """Prompts of captions, one a row: int[N, L] -> dtype[N, num_queries, output_size]; see `read`."""
        return self.prompt(self.read(tokens, segments))

    def read(self, tokens, segments=None, masked=None):
        """What the first token of each row holds in the end.

        Args:
            tokens: int[N, L], one caption a row, from its first place on.
            segments: int[N, L], 0 at padding, or None.
            masked: bool[N, L], the tokens that it may not read, or None.

        Returns:
            dtype[N, hidden_size].

        Raises:
            DataError: more places than positions.
        """
        c = self.config
        if tokens.shape[1] > c.max_length:
            raise DataError(
                f"captions of {tokens.shape[1]} places for a P-Former of {c.max_length} positions",
                f"at most {c.max_length}",
                "shorten the rows, or raise max_length",
            )
        segments = jnp.ones_like(tokens) if segments is None else segments
        if masked is not None:
            tokens = jnp.where(masked, c.mask_id, tokens)
        x = self.token_embedding(tokens) + self.position_embedding(jnp.arange(tokens.shape[1]))
        x = constrain(self.embedding_norm(x), "batch", "seq", None)
        return self.layers(x, None, segments)[0][:, 0]

    def prompt(self, x):
        """dtype[N, hidden_size] -> dtype[N, num_queries, output_size]"""
        return self.language_projection(jnp.tanh(self.prompt_dense(self.prompt_projection(x))))
