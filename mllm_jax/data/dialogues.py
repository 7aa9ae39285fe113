"""Packed rows of conversations with a named model's media: tiles of any number, patches of any size."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from mllm_jax.data.media import Media, Row


@dataclass(frozen=True)
class EncodedDialogue:
    """One example: its text with media in their places, loss_weights float32[n], and what its pictures became."""

    row: Row
    loss_weights: np.ndarray
    media: Sequence[Media]
    dropped_turns: int = 0

    @property
    def tokens(self) -> np.ndarray:
        return self.row.tokens

    @property
    def slots(self) -> int:
        """Tiles or patches that its pictures take in a row."""
        return sum(len(next(iter(m.arrays.values()))) for m in self.media)


def pack_dialogues(
    packed: Sequence[Sequence[EncodedDialogue]], layout: Any, length: int, slots: int
) -> dict[str, np.ndarray]:
    """A batch of rows that hold several examples each, each a segment of its own.

    Args:
        packed: the examples of each row, which fit into `length` and `slots` together.
        layout: the model's, see `mllm_jax.models.processor.Layout`.

    Returns:
        tokens, positions, segments, media_index, loss_weights and what the layout collates; one shape for all batches.
    """
    shape = (len(packed), length)
    tokens, segments, weights = np.zeros(shape, np.int32), np.zeros(shape, np.int32), np.zeros(shape, np.float32)
    collated = layout.collate([[m for e in row for m in e.media] for row in packed], slots)
    index = np.full((*shape, layout.neighbours), -1, np.int32)
    shares = np.zeros(index.shape, np.float32)
    positions = None
    for r, row in enumerate(packed):
        place = number = 0
        for segment, e in enumerate(row, start=1):
            n, here = len(e.tokens), slice(place, place + len(e.tokens))
            tokens[r, here], segments[r, here], weights[r, here] = e.tokens, segment, e.loss_weights
            found = e.row.media_index(collated.first[r][number : number + len(e.media)], collated.newline)
            width = found.shape[1]
            index[r, here] = found[:, :1]
            index[r, here, :width], shares[r, here, :width] = found, e.row.weights
            counted = layout.positions([e.row], [e.media], n)
            counted = np.arange(n, dtype=np.int32) if counted is None else counted[0]
            if positions is None:
                positions = np.zeros((*shape, *counted.shape[1:]), np.int32)
            positions[r, here] = counted
            place, number = place + n, number + len(e.media)
    batch = dict(tokens=tokens, segments=segments, positions=positions, loss_weights=weights, **collated.arrays)
    if layout.neighbours == 1:
        return batch | dict(media_index=index[..., 0])
    return batch | dict(media_index=index, media_weights=shares)
