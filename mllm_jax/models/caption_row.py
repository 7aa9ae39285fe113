"""Rows in which an LLM learns to generate a caption from media tokens (arXiv 2301.12597, section 3.3)."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp


def caption_row(llm: Any, media, tokens, segments) -> dict:
    """Returns a batch for `NextToken` whose captions follow their media tokens; the whole caption carries loss.

    A decoder reads both in one text, the media first; an encoder-decoder reads the media and generates the caption.

    Args:
        llm: the LLM's config.
        media: dtype[B, T, E], in the LLM's space.
        tokens, segments: int[B, L]; segments are 0 at padding, which follows the caption. All segments of a row are
            one caption.

    Returns:
        The arrays that a composed model reads, and `loss_weights`.
    """
    rows, count = media.shape[:2]
    text = (segments > 0).astype(jnp.int32)
    ones = jnp.ones((rows, count), jnp.int32)
    row = dict(media=media, tokens=0 * ones, segments=ones, media_index=ones * jnp.arange(count))
    if llm.encoder_decoder:
        first = ones[:, :1]
        return row | dict(
            decoder_tokens=jnp.concatenate([first * llm.decoder_start_token_id, tokens], axis=1),
            decoder_segments=jnp.concatenate([first, text], axis=1),
            loss_weights=jnp.concatenate([0 * first, text], axis=1).astype(jnp.float32),
        )
    caption = dict(tokens=tokens, segments=text, media_index=jnp.full_like(tokens, -1))
    row |= {name: jnp.concatenate([row[name], array], axis=1) for name, array in caption.items()}
    return row | dict(loss_weights=jnp.concatenate([0 * ones, text], axis=1).astype(jnp.float32))
