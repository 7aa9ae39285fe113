"""Positions of a row that hold no media token, because the number of media tokens is known only after encoding.

A row has a static number of positions for a sound. A projector that fires as many media tokens as it hears leaves some
of them empty. The rest of the row is computed as if the empty positions were not there: no token attends to them, later
positions count on without them, and the token that follows them is predicted from the last position before them.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import struct


@struct.dataclass
class Visible:
    """The row without its hidden positions.

    Attributes:
        positions, segments: as the LLM takes them; segments are 0 at hidden positions.
        last: int[B, S], the last visible position up to each position, in its segment. A hidden position without one
            has its own.
    """

    positions: jax.Array
    segments: jax.Array
    last: jax.Array


def hide(hidden: jax.Array, positions: jax.Array | None, segments: jax.Array) -> Visible:
    """Hides positions of packed rows.

    Args:
        hidden: bool[B, S].
        positions: int[B, S], or int[B, S, axes] for M-RoPE, counted as if nothing were hidden; None counts from 0.
        segments: int[B, S], each in one piece of the row.
    """
    here = jnp.arange(segments.shape[1])
    starts = jnp.pad(segments[:, 1:] != segments[:, :-1], ((0, 0), (1, 0)), constant_values=True)
    hidden = hidden & (segments > 0)
    count = jnp.cumsum(hidden, axis=1)
    before = jax.lax.cummax(jnp.where(starts, count - hidden, 0), axis=1)  # hidden ones of the segments before
    shift = count - before
    if positions is None:
        positions = jnp.broadcast_to(here, segments.shape)
        shift = count
    return Visible(
        positions=positions - (shift if positions.ndim == 2 else shift[..., None]),
        segments=jnp.where(hidden, 0, segments),
        last=jax.lax.cummax(jnp.where(starts | ~hidden, here, 0), axis=1),
    )
