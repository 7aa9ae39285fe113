"""Output projectors: what a model needs to know of one, and the sizes that those of signal or query tokens share.

The LLM emits N signal or query tokens. Their last hidden states S_X become the condition H_X = OP(S_X) of a generator,
which takes the place of its own text encoder's output:

| generator | condition | signal tokens in NExT-GPT (arXiv 2309.05519) |
|---|---|---|
| Stable Diffusion 1.5 | 77 x 768 | 4 |
| Stable Diffusion 2, Zeroscope | 77 x 1024 | 4 for images, 24 for videos |
| AudioLDM | 1 x 512 | 8 |
| AudioLDM-2 | two, see `mllm_jax.output_projectors.several` | 8 |
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Protocol, runtime_checkable

import jax
from flax import linen as nn

from mllm_jax.errors import DataError
from mllm_jax.layers.compute import WithCompute
from mllm_jax.layers.requirements import Requirements


@runtime_checkable
class OutputProjectorConfig(Protocol):
    """The config of an output projector. Its module is called `module(states, embeddings=None, mask=None)`.

    The arguments are the LLM's last hidden states dtype[B, N, E] of the tokens, the embeddings dtype[B, N, E] of the
    same tokens, and bool[B, N], False at states that do not count. The result is the condition
    dtype[B, output_tokens, output_size]; a projector with several conditions has tuples of all three.

    Attributes:
        tokens: N, the number of signal or query tokens, or the most tokens of a prompt.
        input_size: E, the LLM's hidden size; None until the projector is joined to an LLM.
        reads_embeddings: whether the module needs `embeddings`.
    """

    tokens: int
    input_size: int | None
    reads_embeddings: bool

    @property
    def output_tokens(self) -> int | tuple[int, ...]: ...
    @property
    def output_size(self) -> int | tuple[int, ...]: ...

    def output_mask(self, mask: jax.Array | None) -> jax.Array | None | tuple[jax.Array | None, ...]:
        """Returns bool[B, output_tokens], the part of the condition that counts; None: all of it."""
        ...

    def make(self) -> nn.Module: ...


@dataclass(frozen=True)
class TokensToCondition(WithCompute):
    """The fields of every output projector with one condition.

    Attributes:
        tokens: number of signal or query tokens.
        input_size: width of their states; None takes the LLM's hidden size.
        output_size: width of the condition.
    """

    tokens: int = 4
    input_size: int | None = None
    output_size: int = 768

    reads_embeddings: ClassVar[bool] = False

    def __post_init__(self):
        names = ("tokens", "input_size", "output_tokens", "output_size")
        given = {name: getattr(self, name) for name in names}
        Requirements(type(self).__name__, self)(
            all(value is None or value >= 1 for value in given.values()),
            ", ".join(f"{name} {value}" for name, value in given.items()),
            "at least 1 of each",
            "change the one that is smaller",
        )

    def output_mask(self, mask: jax.Array | None) -> jax.Array | None:
        """Returns None: every vector of the condition counts."""
        return None

    def check(self, states: jax.Array, embeddings: jax.Array | None) -> None:
        """Raises DataError: states of another shape, or no embeddings where they are read."""
        wanted = (self.tokens, self.input_size)
        given = {"states": states} | ({"embeddings": embeddings} if self.reads_embeddings else {})
        for name, array in given.items():
            if array is None or array.shape[1:] != wanted:
                raise DataError(
                    f"{type(self).__name__}: {name} {None if array is None else array.shape}",
                    f"[rows, {wanted[0]}, {wanted[1]}]",
                    f"pass the {name} of the projector's {self.tokens} tokens, or change tokens or input_size",
                )
