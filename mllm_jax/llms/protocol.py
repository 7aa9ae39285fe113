"""The protocols of a language model: the attributes and methods that the library needs of it."""

from __future__ import annotations

from typing import Any, Protocol, runtime_checkable

import jax

from mllm_jax.layers.compute import Compute


@runtime_checkable
class LLMConfig(Protocol):
    """The config of a language model, a dataclass with `mllm_jax.layers.compute.WithCompute` as its base.

    Attributes:
        family: the Hugging Face architecture of the saved folder; None for a model that is composed here.
        encoder_decoder: whether an encoder reads the text and a decoder writes the answer. Such a config has
            `decoder_start_token_id`, and its module has `start`.
        eos_token_id: each of them ends an answer.
        compute: the precision and memory settings; `dtype`, `remat` and `scan_unroll` are their values in use.
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
        """Returns the module."""
        ...

    def make_cache(self, batch: int, size: int) -> Any:
        """Returns an empty cache for `batch` rows of at most `size` tokens."""
        ...


class LLM(Protocol):
    """The module of a language model, from tokens and embedded media to logits.

    It is called as `module(tokens, positions, segments, *, embeddings=None, cache=None, project=True)`, with tokens and
    segments int[B, S] and positions int[B, S], or None to count them. It returns float32[B, S, V] logits; with a cache,
    (logits, cache); with `project=False`, the inputs of the output head, `mllm_jax.layers.head.HeadInputs`.
    `logits_at` int[B, M] selects M positions a row. The decoder of an encoder-decoder reads `decoder_tokens`,
    `decoder_positions` and `decoder_segments`.
    """

    def embed(self, tokens: jax.Array) -> jax.Array:
        """Maps int[...] to dtype[..., E]."""
        ...

    def start(self, tokens: Any, positions: Any, segments: Any, *, embeddings: Any, size: int) -> Any:
        """Encodes the source of an encoder-decoder and returns the cache for `size` tokens of an answer."""
        ...
