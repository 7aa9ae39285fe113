"""T5's relative position bias: one learned number per head and bucket of distances (arXiv 1910.10683, section 2.1)."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from mllm_jax.errors import ConfigError


def bucket_of_distance(num_buckets: int, max_distance: int) -> np.ndarray:
    """Returns int32[max_distance + 1]: the bucket of each distance; larger distances share the last bucket.

    The first half of the buckets hold one distance each; the others widen logarithmically up to `max_distance`. NumPy
    computes them once, so that their borders are the same on every platform: the last bit of a logarithm moves them.

    Raises:
        ConfigError: numbers that leave no bucket for the logarithmic half.
    """
    exact = num_buckets // 2
    if exact < 1 or max_distance <= exact:
        raise ConfigError(
            f"relative position bias: {num_buckets} buckets a direction, max_distance {max_distance}",
            "at least 2 buckets, and a max_distance larger than half of their number",
            "change the number of buckets or the distance",
        )
    distance = np.arange(max_distance + 1)
    # float32 in each step, as in the reference: some borders are whole numbers.
    ratio = np.log(np.maximum(distance, 1).astype(np.float32) / np.float32(exact)) / np.float32(
        math.log(max_distance / exact)
    )
    wide = exact + (ratio * np.float32(num_buckets - exact)).astype(np.int32)
    return np.where(distance < exact, distance, np.minimum(wide, num_buckets - 1)).astype(np.int32)


class RelativeBias(nn.Module):
    """A bias of attention scores by the distance of key and query; T5 computes it once for all its layers.

    Attributes:
        bidirectional: whether half of the buckets are for keys after the query; otherwise those count as distance 0.
    """

    num_heads: int
    num_buckets: int = 32
    max_distance: int = 128
    bidirectional: bool = True
    init_std: float = 0.02

    @nn.compact
    def __call__(self, q_positions: jax.Array, k_positions: jax.Array) -> jax.Array:
        """Maps int[B, S], int[B, T] to float32[B, N, S, T]; only differences of positions matter.

        Raises:
            ConfigError: see `bucket_of_distance`.
        """
        buckets = self.num_buckets // 2 if self.bidirectional else self.num_buckets
        of_distance = jnp.asarray(bucket_of_distance(buckets, self.max_distance))
        relative = k_positions[:, None, :] - q_positions[:, :, None]
        distance = jnp.abs(relative) if self.bidirectional else jnp.maximum(-relative, 0)
        bucket = of_distance[jnp.minimum(distance, self.max_distance)]
        if self.bidirectional:
            bucket = bucket + buckets * (relative > 0)
        init = nn.with_logical_partitioning(nn.initializers.normal(self.init_std), (None, "heads"))
        table = self.param("embedding", init, (self.num_buckets, self.num_heads), jnp.float32)
        return jnp.moveaxis(jnp.take(table, bucket, axis=0), -1, 1)
