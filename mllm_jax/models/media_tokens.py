"""Encoded media of a batch of rows, of one branch or of several, and their positions in the text."""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from einops import rearrange
from flax import struct

from mllm_jax.layers.context_gather import take_along_rows
from mllm_jax.models.sound_targets import Heard


@struct.dataclass
class MediaTokens:
    """Encoded media of a batch of rows.

    Attributes:
        tokens: dtype[B, N, E], every slot's media tokens in the order of the slots.
        deepstack: for each of the LLM's first layers, dtype[B, N, E] that is added to its output at the positions of
            these tokens (arXiv 2406.04334); empty for most encoders.
        mask: bool[B, N], False for tokens that a projector did not fire, see `mllm_jax.models.hidden`; None: all exist.
        heard: facts about the sounds of projectors that fire, one entry a branch.
    """

    tokens: jax.Array
    deepstack: tuple[jax.Array, ...] = ()
    mask: jax.Array | None = None
    heard: tuple[Heard, ...] = ()


def side_by_side(media: Sequence[MediaTokens]) -> MediaTokens | None:
    """Concatenates the media of several branches; deepstack is 0 for branches that have none."""
    if len(media) < 2:
        return media[0] if media else None
    layers = range(max(len(m.deepstack) for m in media))
    added = [[m.deepstack[layer] if m.deepstack else 0 * m.tokens for m in media] for layer in layers]
    tokens, mask = jnp.concatenate([m.tokens for m in media], axis=1), None
    if any(m.mask is not None for m in media):
        exist = [jnp.ones(m.tokens.shape[:2], bool) if m.mask is None else m.mask for m in media]
        mask = jnp.concatenate(exist, axis=1)
    deepstack = tuple(jnp.concatenate(each, axis=1) for each in added)
    return MediaTokens(tokens, deepstack, mask, tuple(heard for m in media for heard in m.heard))


def placed(media, index, weights, newline=None):
    """Gathers dtype[B, N, E] to [B, S, E]; index N is the newline [E], if there is one. See `Multimodal.merge`."""

    def take(index):
        found = take_along_rows(media, jnp.clip(index, 0, media.shape[1] - 1))
        return found if newline is None else jnp.where((index == media.shape[1])[..., None], newline, found)

    if index.ndim == 2:
        return take(index)
    found = rearrange(take(rearrange(index, "b s k -> b (s k)")), "b (s k) e -> b s k e", k=index.shape[-1])
    return jnp.einsum("bske,bsk->bse", found, weights.astype(media.dtype))
