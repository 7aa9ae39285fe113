"""The key-value cache of a decoder: static shapes, one stack for all layers."""

from __future__ import annotations

from typing import ClassVar

import jax
import jax.numpy as jnp
from flax import struct

from mllm_jax.layers.attention import write_at
from mllm_jax.sharding.logical import constrain


@struct.dataclass
class KVCache:
    """The keys and values of the tokens that a decoder has read.

    keys, values: dtype[L, B, T, K, H]; segments: int[B, T], 0 where nothing was written; length: int[B];
    offset: int[B], the next token's position minus `length`, which is not 0 after media with M-RoPE.
    shared: names of the fields that are equal for all beams of a prompt.
    """

    shared: ClassVar[tuple[str, ...]] = ()

    keys: jax.Array
    values: jax.Array
    segments: jax.Array
    length: jax.Array
    offset: jax.Array

    @classmethod
    def zeros(cls, num_layers: int, batch: int, size: int, num_kv_heads: int, head_dim: int, dtype) -> KVCache:
        shape = (num_layers, batch, size, num_kv_heads, head_dim)
        names = ("layers", "batch", None, "kv_heads", "head_dim")
        return cls(
            keys=constrain(jnp.zeros(shape, dtype), *names),
            values=constrain(jnp.zeros(shape, dtype), *names),
            segments=jnp.zeros((batch, size), jnp.int32),
            length=jnp.zeros((batch,), jnp.int32),
            offset=jnp.zeros((batch,), jnp.int32),
        )

    def reserve(self, segments: jax.Array, positions: jax.Array | None = None) -> tuple[KVCache, jax.Array]:
        """Makes room for a chunk of tokens after the cached tokens.

        Padding (segment 0, at the end of a chunk) takes no room: its index lies past the end, where writes are dropped.

        Args:
            segments: int[B, S] of the chunk.
            positions: int[B, S] or int[B, S, 3] of the chunk; None counts them. Text continues after the largest.

        Returns:
            The cache with new segments and length (keys and values are unchanged), and the index int[B, S] of each
            token in the cache.
        """
        real = (segments > 0).astype(jnp.int32)
        index = jnp.where(real > 0, self.length[:, None] + jnp.cumsum(real, axis=1) - 1, self.segments.shape[1])
        written = write_at(self.segments, segments, index)
        length, offset = self.length + real.sum(axis=1), self.offset
        if positions is not None:
            largest = positions if positions.ndim == 2 else positions.max(axis=-1)
            largest = jnp.where(real > 0, largest, -1).max(axis=1)
            offset = jnp.where(largest >= 0, largest + 1 - length, offset)
        return self.replace(segments=written, length=length, offset=offset), index
