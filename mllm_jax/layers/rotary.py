"""Rotary position embedding (RoFormer, arXiv 2104.09864) and the ways to stretch it to longer texts.

Every function is pure and can be traced. Values that depend only on the configuration are computed in Python.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange

from mllm_jax.errors import ConfigError

KINDS = ("default", "linear", "dynamic", "llama3", "yarn")


@dataclass(frozen=True)
class RopeScaling:
    """The stretching of a decoder's rotary frequencies beyond the length that it was trained on.

    Attributes:
        kind: "default" changes nothing; "linear" divides the positions (arXiv 2306.15595); "dynamic" raises theta with
            the length of the text (NTK-aware); "llama3" divides only the low frequencies (arXiv 2407.21783); "yarn"
            does so with a ramp and scales the attention (arXiv 2309.00071).
        factor: ratio of the new length to the trained length.
        original_max_position_embeddings: the trained length; needed by all kinds but "default" and "linear".
        low_freq_factor, high_freq_factor: "llama3": wavelengths of length/low and more are divided, those of
            length/high and less are not, with a smooth transition between them.
        beta_fast, beta_slow: "yarn": rotations over the trained length that bound the ramp.
        truncate: "yarn": whether the ramp starts and ends at whole dimensions.
        attention_factor: "yarn": factor of cosines and sines; None computes it from `factor`, and from mscale and
            mscale_all_dim where both are given.
    """

    kind: str = "default"
    factor: float = 1.0
    original_max_position_embeddings: int | None = None
    low_freq_factor: float | None = None
    high_freq_factor: float | None = None
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True
    attention_factor: float | None = None
    mscale: float | None = None
    mscale_all_dim: float | None = None

    def __post_init__(self):
        if self.kind not in KINDS:
            raise ConfigError(f"rope scaling {self.kind!r}", f"one of {', '.join(KINDS)}", "change rope_scaling.kind")
        needed = {"llama3": ("low_freq_factor", "high_freq_factor")}.get(self.kind, ())
        needed += ("original_max_position_embeddings",) if self.kind in ("dynamic", "llama3", "yarn") else ()
        missing = [name for name in needed if getattr(self, name) is None]
        if missing:
            raise ConfigError(f"rope scaling {self.kind!r} without {', '.join(missing)}", "all that it needs", "add it")

    @property
    def amplitude(self) -> float:
        """Returns the factor of cosines and sines; its square scales the attention scores."""
        if self.kind != "yarn":
            return 1.0
        if self.attention_factor is not None:
            return self.attention_factor
        if self.mscale and self.mscale_all_dim:
            return self._mscale(self.mscale) / self._mscale(self.mscale_all_dim)
        return self._mscale(1.0)

    def _mscale(self, weight: float) -> float:
        return 1.0 if self.factor <= 1 else 0.1 * weight * math.log(self.factor) + 1.0


def rotary_frequencies(
    dim: int, theta: float, scaling: RopeScaling = RopeScaling(), length: jax.Array | None = None
) -> jax.Array:
    """Returns the radians that each pair of dimensions turns from one position to the next.

    Args:
        dim: rotated dimensions of a head; an odd number is rounded up.
        length: int[...], number of tokens of the text; only "dynamic" reads it.

    Returns:
        float32[..., ceil(dim / 2)], with the leading dimensions of `length` for "dynamic", else without.
    """
    exponents = jnp.arange(0, dim, 2, dtype=jnp.float32) / dim
    if scaling.kind == "dynamic":
        trained = scaling.original_max_position_embeddings
        longer = jnp.maximum(length, trained).astype(jnp.float32)[..., None] / trained
        theta = theta * (scaling.factor * longer - (scaling.factor - 1)) ** (dim / (dim - 2))
    frequencies = theta**-exponents
    if scaling.kind == "linear":
        return frequencies / scaling.factor
    if scaling.kind == "llama3":
        # Rotations over the trained length: pairs with many keep their speed, pairs with few are slowed down.
        rotations = scaling.original_max_position_embeddings * frequencies / (2 * math.pi)
        low, high = scaling.low_freq_factor, scaling.high_freq_factor
        kept = jnp.clip((rotations - low) / (high - low), 0.0, 1.0)
        return frequencies * (kept + (1 - kept) / scaling.factor)
    if scaling.kind == "yarn":
        low, high = _yarn_ramp(dim, theta, scaling)
        slowed = jnp.clip((jnp.arange((dim + 1) // 2, dtype=jnp.float32) - low) / (high - low), 0.0, 1.0)
        return frequencies * (1 - slowed + slowed / scaling.factor)
    return frequencies


def _yarn_ramp(dim: int, theta: float, scaling: RopeScaling) -> tuple[float, float]:
    """Returns the pairs of dimensions between which yarn's ramp rises from 0 to 1."""

    def pair_that_turns(rotations: float) -> float:
        trained = scaling.original_max_position_embeddings
        return dim * math.log(trained / (rotations * 2 * math.pi)) / (2 * math.log(theta))

    low, high = pair_that_turns(scaling.beta_fast), pair_that_turns(scaling.beta_slow)
    if scaling.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    return low, high if high != low else high + 0.001  # a step, not a division by zero


def rotary_angles(
    positions: jax.Array,
    dim: int,
    theta: float,
    scaling: RopeScaling = RopeScaling(),
    length: jax.Array | None = None,
    parts: np.ndarray | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Returns cosines and sines, float32[..., ceil(dim / 2)], of int positions[...].

    Args:
        dim, theta, scaling, length: see `rotary_frequencies`; `length` has the shape of `positions`.
        parts: int[dim / 2], for positions[..., 3]: the part of a position that turns each pair of dimensions.
    """
    frequencies = rotary_frequencies(dim, theta, scaling, length)
    turning = positions[..., None] if parts is None else positions[..., parts]
    angles = turning.astype(jnp.float32) * frequencies
    return jnp.cos(angles) * scaling.amplitude, jnp.sin(angles) * scaling.amplitude


def mrope_parts(sections: Sequence[int], interleaved: bool = False) -> np.ndarray:
    """Returns int[pairs]: whether time (0), height (1) or width (2) turns each pair (M-RoPE, arXiv 2409.12191).

    Args:
        sections: number of pairs that each of the three turns, in this order.
        interleaved: whether the order is time, height, width, time, ...; time gets the pairs that are left.
    """
    if not interleaved:
        return np.repeat(np.arange(3), sections)
    parts = np.zeros(sum(sections), np.int64)
    for part in (1, 2):
        parts[part : 3 * sections[part] : 3] = part
    return parts


def grid_angles(places: jax.Array, dim: int, theta: float) -> tuple[jax.Array, jax.Array]:
    """Returns cosines and sines, float32[..., dim / 2], of places[..., 2] on a grid: of the row, then of the column.

    Each turns half of the head's `dim` dimensions, a multiple of four (EVA-02, arXiv 2303.11331, section 2).
    """
    frequencies = rotary_frequencies(dim // 2, theta)
    angles = places[..., None].astype(jnp.float32) * frequencies
    angles = rearrange(angles, "... axes half -> ... (axes half)")
    return jnp.cos(angles), jnp.sin(angles)


def apply_rotary(x: jax.Array, angles: tuple[jax.Array, jax.Array], interleaved: bool = False) -> jax.Array:
    """Rotates x[B, S, N, H] by the angles [B, S, R/2] of its positions; dimensions from R on are unchanged.

    Args:
        interleaved: whether dimensions 2i and 2i+1 turn together (RoFormer, GLM), instead of i and i + R/2 (LLaMA's
            weights on the hub).
    """
    cos, sin = (a[:, :, None, :].astype(x.dtype) for a in angles)
    turned, kept = x[..., : 2 * cos.shape[-1]], x[..., 2 * cos.shape[-1] :]
    if interleaved:
        first, second = turned[..., 0::2], turned[..., 1::2]
    else:
        first, second = jnp.split(turned, 2, axis=-1)
    first, second = first * cos - second * sin, second * cos + first * sin
    if interleaved:
        turned = jnp.stack([first, second], axis=-1).reshape(turned.shape)
    else:
        turned = jnp.concatenate([first, second], axis=-1)
    return jnp.concatenate([turned, kept], axis=-1) if kept.shape[-1] else turned
