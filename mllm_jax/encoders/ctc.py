"""Connectionist temporal classification (CTC): an encoder's logits, and the ids of the most probable path."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import struct

from mllm_jax.encoders.audio_output import AudioOutput


@struct.dataclass
class CTCOutput:
    """The output of an audio encoder with a CTC head.

    Attributes:
        logits: float32[B, T, V], of each vector; `encoder.mask` marks the valid ones.
        encoder: the encoder's own output.
    """

    logits: jax.Array
    encoder: AudioOutput


def ctc_greedy(logits: jax.Array, mask: jax.Array | None = None, blank: int = 0) -> jax.Array:
    """Returns the ids of the most probable path: repeats are merged, then blanks are left out.

    Args:
        logits: float[B, T, V].
        mask: bool[B, T], True for vectors of valid input, the first of each row; None: all are valid.
        blank: id of the blank, `config.blank`.

    Returns:
        int32[B, T]: the ids of each row, then -1.
    """
    best = logits.argmax(axis=-1).astype(jnp.int32)
    before = jnp.pad(best[:, :-1], ((0, 0), (1, 0)), constant_values=-1)
    kept = (best != before) & (best != blank)
    if mask is not None:
        kept &= mask.astype(bool)
    # A stable sort moves the kept ids to the front, in their order.
    order = jnp.argsort(~kept, axis=-1, stable=True)
    found = jnp.arange(best.shape[1]) < kept.sum(axis=-1, keepdims=True)
    return jnp.where(found, jnp.take_along_axis(best, order, axis=-1), -1)
