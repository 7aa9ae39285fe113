"""Gathers from rows that a mesh splits along the sequence, so that split media reach split text."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from mllm_jax.sharding.logical import active_mesh, axes_of, partition_spec


def take_along_rows(x: jax.Array, index: jax.Array) -> jax.Array:
    """Returns x[b, index[b, s]] for each row b and position s.

    If the surrounding `use_mesh` splits both x and index along the row, x is passed around the ring of the devices that
    share a row, and each device takes what it needs; none ever holds a whole row. If the lengths are not divisible, the
    partitioner gathers x.

    Args:
        x: [B, N, E].
        index: int[B, S] of 0..N-1.

    Returns:
        [B, S, E] in x's dtype.
    """
    active = active_mesh()
    if active is not None:
        mesh, rules = active
        rows, seq, _ = partition_spec(("batch", "seq", None), x.shape, mesh, rules)
        if seq is not None and (rows, seq) == tuple(partition_spec(("batch", "seq"), index.shape, mesh, rules)):
            split = PartitionSpec(rows, seq)
            return jax.shard_map(
                lambda x, index: _ring_take(x, index, seq),
                mesh=mesh,
                in_specs=(split, split),
                out_specs=split,
                axis_names={*axes_of(rows), *axes_of(seq)},
                check_vma=False,
            )(x, index)
    return jnp.take_along_axis(x, index[..., None], axis=1)


def _ring_take(x, index, axes):
    """Returns what this device's positions take from all devices of a row, visited in the order of the axes."""
    size, here = jax.lax.axis_size(axes), jax.lax.axis_index(axes)
    to = [(i, (i + 1) % size) for i in range(size)]

    def take(found, x, turn):
        position = index - (here - turn) % size * x.shape[1]
        there = (position >= 0) & (position < x.shape[1])
        taken = jnp.take_along_axis(x, jnp.clip(position, 0, x.shape[1] - 1)[..., None], axis=1)
        return jnp.where(there[..., None], taken, found)

    def one(carry, turn):
        found, x = carry
        coming = jax.lax.ppermute(x, axes, to)
        return (take(found, x, turn), coming), None

    found = jnp.zeros((*index.shape, x.shape[-1]), x.dtype)
    (found, x), _ = jax.lax.scan(one, (found, x), jnp.arange(size - 1))
    return take(found, x, size - 1)
