"""Attention on TPU: Pallas' splash kernel, which keeps the scores on the chip and skips what a mask hides."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from einops import rearrange
from jax.sharding import Mesh, PartitionSpec

from mllm_jax.sharding.logical import RULES, partition_spec

LANES = 128
BLOCK = 512


def splash_supports(q: jax.Array, k: jax.Array, mask: str, window) -> bool:
    """Returns whether the kernel applies: a static window, and self-attention if the mask depends on order."""
    static = window is None or isinstance(window, int)
    return static and (mask == "full" or q.shape[1] == k.shape[1])


def splash_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    *,
    mask: str = "full",
    q_segments: jax.Array | None = None,
    k_segments: jax.Array | None = None,
    window: int | None = None,
    scale: float | None = None,
    mesh: Mesh | None = None,
    rules=RULES,
    interpret: bool = False,
) -> jax.Array:
    """Computes `attention` for what `splash_supports`; a query that sees no key gets the mean of some values.

    Rows and heads are split over the mesh by the rules; the positions of a row stay together.

    Args:
        q: [B, S, N, H].  k, v: [B, T, K, H].  For the others see `mllm_jax.layers.attention.attention`.
        interpret: whether to interpret the kernel on any platform, for tests.
    """
    queries, keys = q.shape[1], k.shape[1]
    q = q * (q.shape[-1] ** -0.5 if scale is None else scale)
    padded_q, padded_k = _padded(queries), _padded(keys)
    if q_segments is None and padded_k > keys:
        q_segments, k_segments = jnp.ones(q.shape[:2], jnp.int32), jnp.ones(k.shape[:2], jnp.int32)
    if q_segments is not None:  # padding is a segment that no text has
        q_segments = filled(q_segments, padded_q, value=-1)
        k_segments = filled(k_segments, padded_k, value=-1)
    q, k, v = filled(q, padded_q), filled(k, padded_k), filled(v, padded_k)

    def local(q, k, v, *segments):
        kernel = _kernel(q.shape[2], padded_q, padded_k, mask, window, interpret)
        q, k, v = (rearrange(x, "b s n h -> b n s h") for x in (q, k, v))
        if not segments:
            y = jax.vmap(kernel)(q, k, v)
        else:
            from jax.experimental.pallas.ops.tpu.splash_attention import SegmentIds

            y = jax.vmap(lambda q, k, v, *ids: kernel(q, k, v, segment_ids=SegmentIds(*ids)))(q, k, v, *segments)
        return rearrange(y, "b n s h -> b s n h")

    segments = () if q_segments is None else (q_segments, k_segments)
    if mesh is not None:
        names = ("batch", None, "heads", None)
        spec = partition_spec(names, q.shape, mesh, rules)
        kv_spec = partition_spec(("batch", None, "kv_heads", None), k.shape, mesh, rules)
        if kv_spec != spec:  # the axes divide the heads but not the key heads: each head gets its own keys
            k, v = (jnp.repeat(x, q.shape[2] // x.shape[2], axis=2) for x in (k, v))
        rows = PartitionSpec(spec[0], None)
        local = jax.shard_map(
            local, mesh=mesh, in_specs=(spec,) * 3 + (rows,) * len(segments), out_specs=spec, check_vma=False
        )
    return local(q, k, v, *segments)[:, :queries]


def _padded(length: int) -> int:
    """Rounds a length up to whole lanes, and to whole blocks if there is more than one."""
    unit = LANES if length <= BLOCK + LANES else BLOCK
    return -(-length // unit) * unit


def filled(x: jax.Array, length: int, value: int = 0) -> jax.Array:
    """Pads [B, S, ...] to S = length."""
    return jnp.pad(x, [(0, 0), (0, length - x.shape[1])] + [(0, 0)] * (x.ndim - 2), constant_values=value)


def _kernel(heads: int, queries: int, keys: int, mask: str, window: int | None, interpret: bool):
    """Returns the kernel [N, S, H], [K, T, H], [K, T, H] -> [N, S, H] of one row."""
    # Pallas takes a second to import, and only programs for a TPU need it.
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as splash
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks

    shape = (queries, keys)
    if window is not None:
        one = masks.LocalMask(shape, (window - 1, 0), 0)
    else:
        one = masks.CausalMask(shape) if mask == "causal" else masks.FullMask(shape)
    block_q, block_k = (length if length <= BLOCK + LANES else BLOCK for length in shape)
    sizes = splash.BlockSizes(
        block_q=block_q,
        block_kv=block_k,
        block_q_dkv=block_q,
        block_kv_dkv=block_k,
        block_q_dq=block_q,
        block_kv_dq=block_k,
    )
    return splash.make_splash_mha(
        masks.MultiHeadMask([one] * heads), head_shards=1, q_seq_shards=1, block_sizes=sizes, interpret=interpret
    )
