"""What the library asks of a language model: a new one has these, and nothing has to guess them."""

from __future__ import annotations

from typing import Any, Protocol, runtime_checkable

import jax

from mllm_jax.layers.compute import Compute


@runtime_checkable
class LLMConfig(Protocol):
    """The config of a language model, a dataclass with `mllm_jax.layers.compute.WithCompute` as its base.

    Attributes:
        family: the Hugging Face architecture that it is written as; None of one that is composed here.
        encoder_decoder: whether a text is read by an encoder and answers are written by a decoder. Such a config has
            `decoder_start_token_id`, and its module `start`.
        eos_token_id: each of them ends an answer.
        compute: how it is computed; `dtype`, `remat` and `scan_unroll` are what that comes to.
    """

    family: str | None
    encoder_decoder: bool
    vocab_size: int
    hidden_size: int
    num_layers: int
    eos_token_id: tuple[int, ...]
    compute: Compute

    @property
    def dtype(self) -> str: ...
    @property
    def remat(self) -> str: ...
    @property
    def scan_unroll(self) -> int: ...

    def make(self) -> Any:
        """The module."""
        ...

    def make_cache(self, batch: int, size: int) -> Any:
        """An empty cache for so many rows of so many tokens."""
        ...


class LLM(Protocol):
    """The module of a language model: tokens and what media became in, logits out.

    Called as `module(tokens, positions, segments, *, embeddings=None, cache=None, project=True)`: with tokens, segments
    int[B, S] and positions int[B, S], or None to count them. It gives float32[B, S, V] logits, (logits, cache) where a
    cache is given, or what the output head reads, `mllm_jax.layers.head.HeadInputs`, with `project=False`. Besides,
    `logits_at` int[B, M] asks for the logits of M positions a row; `decoder_tokens`, `decoder_positions` and
    `decoder_segments` are what an encoder-decoder's decoder reads.
    """

    def embed(self, tokens: jax.Array) -> jax.Array:
        """int[...] -> dtype[..., E]"""
        ...

    def start(self, tokens: Any, positions: Any, segments: Any, *, embeddings: Any, size: int) -> Any:
        """Of an encoder-decoder: reads the source and makes the cache for `size` tokens of an answer."""
        ...
