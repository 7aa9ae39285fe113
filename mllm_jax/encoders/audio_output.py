"""The output of audio encoders."""

from __future__ import annotations

import jax
from flax import struct


@struct.dataclass
class AudioOutput:
    """The output of every audio encoder.

    Attributes:
        last_hidden_state: dtype[B, T, E].
        mask: bool[B, T], True for vectors of valid input; None without a mask: all are valid.
        hidden_states: None, or the first layer's input and each layer's output, dtype[B, T, E] each, as the reference
            has them.
    """

    last_hidden_state: jax.Array
    mask: jax.Array | None = None
    hidden_states: tuple[jax.Array, ...] | None = None
