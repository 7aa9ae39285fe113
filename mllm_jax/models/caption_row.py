"""Media tokens and their caption as an LLM learns to say the one from the other (arXiv 2301.12597, section 3.3)."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp


def caption_row(llm: Any, media, tokens, segments) -> dict:
    """The batch in which each row's caption follows its media tokens, for `NextToken`; all of the caption is learnt.

    A decoder reads both in one text, the media first; an encoder-decoder reads the media and writes the caption.

    Args:
        llm: the LLM's config.
        media: dtype[B, T, E], in the LLM's space.
        tokens, segments: int[B, L], 0 in segments at padding, which is behind the caption. What stands in a row is one
            caption, even if it is made of several.

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
    behind = dict(tokens=tokens, segments=text, media_index=jnp.full_like(tokens, -1))
    row |= {name: jnp.concatenate([row[name], array], axis=1) for name, array in behind.items()}
    return row | dict(loss_weights=jnp.concatenate([0 * ones, text], axis=1).astype(jnp.float32))
