"""The numbers of media tokens that a projector is trained to fire, from the answers of a batch."""

from __future__ import annotations

from collections.abc import Mapping

import jax
import jax.numpy as jnp
from flax import struct


@struct.dataclass
class Heard:
    """The sounds of one branch, in M slots of each row.

    Attributes:
        fires: int32[B, M], the number of fires.
        count: int32[B, M], the number of media tokens, which a bound may make smaller.
        quantity: float32[B, M], the sum of the unscaled weights.
        targets: float32[B, M], see `sound_targets`; None outside of training.
    """

    fires: jax.Array
    count: jax.Array
    quantity: jax.Array
    targets: jax.Array | None = None


def answer_lengths(batch: Mapping[str, jax.Array], ends: int) -> jax.Array:
    """Returns int[B, S]: the number of tokens of the answers in each position's segment.

    Args:
        batch: with `loss_weights`: the tokens that carry loss are those of answers.
        ends: the number of them in each segment that do not belong to an answer, such as the end of text.
    """
    side = "decoder_" if "decoder_tokens" in batch else ""
    answers, segments = batch[f"{side}segments"], batch["segments"]
    rows = jnp.arange(len(segments))[:, None]
    most = max(answers.shape[1], segments.shape[1]) + 1  # of segments in a row
    counts = jnp.zeros((len(segments), most), jnp.int32).at[rows, answers].add(batch["loss_weights"] > 0)
    return jnp.maximum(counts[rows, segments] - ends, 0) * (segments > 0)


def sound_targets(batch: Mapping[str, jax.Array], first: int, slots: int, size: int) -> jax.Array | None:
    """Returns float32[B, M]: the target length of the sound in each slot, 0 for an empty slot or one without an answer.

    Sounds of one segment share its answer in proportion to their positions in the text, and so to their lengths.

    Args:
        batch: `answer_lengths` int[B, S] of that function, `media_index` and `segments`; without the first, None.
        first: index of the first media token of slot 0.
        slots: M, their number in a row.
        size: media tokens of a slot.
    """
    if "answer_lengths" not in batch:
        return None
    index = batch["media_index"]
    index = (index if index.ndim == 2 else index[..., 0]) - first
    slot = jnp.where(index >= 0, index // size, -1)
    here = slot[:, :, None] == jnp.arange(slots)  # [B, S, M]
    segment = jnp.where(here, batch["segments"][:, :, None], 0).max(axis=1)
    answer = jnp.where(here, batch["answer_lengths"][:, :, None], 0).max(axis=1)
    positions = here.sum(axis=1)
    together = jnp.where(segment[:, :, None] == segment[:, None, :], positions[:, None, :], 0).sum(axis=2)
    return jnp.where(positions > 0, answer * positions / jnp.maximum(together, 1), 0.0)
