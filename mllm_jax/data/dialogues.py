"""Packed rows of conversations with a named model's media: tiles of any number, patches of any size."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from mllm_jax.data.media import Media, Row


@dataclass(frozen=True)
class EncodedDialogue:
    """One example: its text with media in their places, loss_weights float32[n], and what its pictures became.

    Attributes:
        target: for an encoder-decoder, int[n] of what its decoder writes, which loss_weights then belong to.
        instruction: int[m] of what the projector reads beside its pictures, in the projector's own ids.
    """

    row: Row
    loss_weights: np.ndarray
    media: Sequence[Media]
    dropped_turns: int = 0
    target: np.ndarray | None = None
    instruction: np.ndarray | None = None

    @property
    def tokens(self) -> np.ndarray:
        return self.row.tokens

    @property
    def length(self) -> int:
        """Places of a row that it takes, on the side of an encoder-decoder where it takes more."""
        return max(len(self.row.tokens), 0 if self.target is None else len(self.target))

    @property
    def slots(self) -> int:
        """Tiles or patches that its pictures take in a row."""
        return sum(len(next(iter(m.arrays.values()))) for m in self.media)


def pack_dialogues(
    packed: Sequence[Sequence[EncodedDialogue]], layout: Any, length: int, slots: int, decodes: bool = False
) -> dict[str, np.ndarray]:
    """A batch of rows that hold several examples each, each a segment of its own.

    Args:
        packed: the examples of each row, which fit into `length` and `slots` together.
        layout: the model's, see `mllm_jax.models.processor.Layout`.
        decodes: whether the model is an encoder-decoder, whose examples have targets.

    Returns:
        tokens, positions, segments, media_index, loss_weights and what the layout collates, decoder_* and query_* where
        the model reads them; one shape for all batches.
    """
    batch = _texts(packed, layout, length, slots)
    if decodes:
        batch |= _targets(packed, length)
    if layout.instruction_length:
        batch |= _instructions(packed, slots, layout.instruction_length)
    return batch


def _targets(packed: Sequence[Sequence[EncodedDialogue]], length: int) -> dict[str, np.ndarray]:
    """What the decoder writes of each example, in the segment that its text has on the encoder's side."""
    out = {f"decoder_{name}": np.zeros((len(packed), length), np.int32) for name in ("tokens", "segments", "positions")}
    out["loss_weights"] = np.zeros((len(packed), length), np.float32)
    for r, row in enumerate(packed):
        place = 0
        for segment, e in enumerate(row, start=1):
            here = slice(place, place + len(e.target))
            found = e.target, segment, np.arange(len(e.target)), e.loss_weights
            for array, values in zip(out.values(), found, strict=True):
                array[r, here] = values
            place = here.stop
    return out


def _instructions(packed: Sequence[Sequence[EncodedDialogue]], slots: int, length: int) -> dict[str, np.ndarray]:
    """What the projector reads beside the picture in each slot."""
    tokens = np.zeros((len(packed), slots, length), np.int32)
    segments = np.zeros_like(tokens)
    for r, row in enumerate(packed):
        slot = 0
        for e in row:
            here, n = slice(slot, slot + e.slots), len(e.instruction)
            tokens[r, here, :n], segments[r, here, :n] = e.instruction, 1
            slot = here.stop
    return dict(query_tokens=tokens, query_segments=segments)


def _texts(packed: Sequence[Sequence[EncodedDialogue]], layout: Any, length: int, slots: int) -> dict[str, np.ndarray]:
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
            tokens[r, here], segments[r, here] = e.tokens, segment
            if e.target is None:
                weights[r, here] = e.loss_weights
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
