"""The P-Former (arXiv 2307.07063, section 3.2): a model from a caption to prompts that make an LLM write the caption.

A BERT reads the caption. Its first token's last hidden state becomes a fixed number of vectors in the LLM's embedding
space. The P-Former learns from text alone. Its prompts are then targets for the media tokens of images.
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
        output_size: width of a prompt; None takes the LLM's hidden size.
        vocab_size: number of the tokenizer's ids; None takes the LLM's vocabulary.
        num_queries: number of prompts of a caption of any length.
        max_length: the most tokens of a caption.
        mask_token_id: the id of a masked token; None adds one after the vocabulary.
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
            "an id of the vocabulary, or None to add one",
            "change mask_token_id",
        )

    @property
    def mask_id(self) -> int:
        """The id that replaces a masked token."""
        return self.vocab_size if self.mask_token_id is None else self.mask_token_id

    def for_llm(self, llm: Any) -> PFormerConfig:
        """Returns the config with the fields that are None taken from the LLM."""
        known = {"output_size": llm.hidden_size, "vocab_size": llm.vocab_size}
        return replace(self, **{name: value for name, value in known.items() if getattr(self, name) is None})

    def make(self) -> PFormer:
        Requirements("P-Former", self).given("output_size", "vocab_size")
        return PFormer(self)


class PFormerLayer(nn.Module):
    """A layer of BERT: attention and MLP, each with a residual connection and then a norm."""

    config: PFormerConfig

    @nn.compact
    def __call__(self, x, _, segments):
        """Applies the layer to dtype[N, L, E]; segments are int[N, L], 0 at hidden tokens."""
        x, _ = QFormerAttention(self.config, name="attention")(x, x, k_segments=segments)
        return constrain(FeedForward(self.config, name="text_mlp")(x), "batch", "seq", None), None


class PFormer(nn.Module):
    """The P-Former, from captions to prompts."""

    config: PFormerConfig

    def setup(self):
        c = self.config
        dtype = jnp.dtype(c.dtype)
        common = dict(use_bias=True, init_std=INIT_STD, dtype=dtype)
        self.token_embedding = Embedding(max(c.vocab_size, c.mask_id + 1), c.hidden_size, dtype=dtype)
        # Includes BERT's segment embedding of the first text, which is the same at every position.
        self.position_embedding = Embedding(c.max_length, c.hidden_size, names=(None, "embed"), dtype=dtype)
        self.embedding_norm = LayerNorm(c.norm_eps, dtype)
        self.layers = layers_of(c, PFormerLayer, 1)(c)
        self.prompt_projection = Linear((c.num_queries, c.hidden_size), ("embed", "queries", "channels"), **common)
        self.prompt_dense = Linear((c.hidden_size,), ("embed", "channels"), **common)
        self.language_projection = Linear((c.output_size,), ("channels", "embed"), **common)

    def __call__(self, tokens, segments=None):
        """Maps captions int[N, L], one a row, to prompts dtype[N, num_queries, output_size]; see `read`."""
        return self.prompt(self.read(tokens, segments))

    def read(self, tokens, segments=None, masked=None):
        """Returns the last hidden state of each row's first token.

        Args:
            tokens: int[N, L], one caption a row, from its first position.
            segments: int[N, L], 0 at padding, or None.
            masked: bool[N, L], the masked tokens, or None.

        Returns:
            dtype[N, hidden_size].

        Raises:
            DataError: rows longer than max_length.
        """
        c = self.config
        if tokens.shape[1] > c.max_length:
            raise DataError(
                f"captions of {tokens.shape[1]} tokens for a P-Former of {c.max_length} positions",
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
        """Maps dtype[N, hidden_size] to dtype[N, num_queries, output_size]."""
        return self.language_projection(jnp.tanh(self.prompt_dense(self.prompt_projection(x))))
