"""Attention on NVIDIA GPUs: cuDNN's fused kernel, through `jax.nn.dot_product_attention`."""

from __future__ import annotations

import jax
import jax.numpy as jnp

# Head sizes with cuDNN kernels on every GPU generation that computes in bfloat16.
DTYPES = ("bfloat16", "float16")
MOST_HEAD_DIM = 128


def cudnn_supports(q: jax.Array, mask: str, window) -> bool:
    """Returns whether the kernel applies: 16-bit numbers, heads of a multiple of 8 up to 128, a static window."""
    static = window is None or isinstance(window, int)
    head_dim = q.shape[-1]
    return static and str(q.dtype) in DTYPES and head_dim % 8 == 0 and head_dim <= MOST_HEAD_DIM


def cudnn_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    *,
    mask: str = "full",
    q_segments: jax.Array | None = None,
    k_segments: jax.Array | None = None,
    window: int | None = None,
    scale: float | None = None,
) -> jax.Array:
    """Computes `attention` for what `cudnn_supports`. Segments become a mask [B, 1, S, T] of one byte an entry.

    A query that sees no key is made to see its own position, so that nothing is divided by zero.

    Args:
        q: [B, S, N, H].  k, v: [B, T, K, H].  For the others see `mllm_jax.layers.attention.attention`.
    """
    allowed = None
    if q_segments is not None:
        allowed = q_segments[:, :, None] == k_segments[:, None, :]
        alone = ~allowed.any(axis=-1, keepdims=True)
        allowed = (allowed | (alone & jnp.eye(*allowed.shape[1:], dtype=bool)))[:, None]
    return jax.nn.dot_product_attention(
        q,
        k,
        v,
        mask=allowed,
        is_causal=mask == "causal",
        local_window_size=None if window is None else (window - 1, 0),
        scale=scale,
        implementation="cudnn",
    )
