"""The arrays of a batch, declared, and their assembly from rows of examples."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import Any

import numpy as np

from mllm_jax.errors import DataError

ROW, SEQ, SLOTS = "batch", "seq", "slots"
NO_MEDIA: Mapping[str, int] = MappingProxyType({})  # slots of a row, by modality
ONE_IMAGE: Mapping[str, int] = MappingProxyType({"image": 1})


@dataclass(frozen=True)
class ArraySpec:
    """One array of a batch.

    Attributes:
        shape: rows first.
        fill: the value of empty positions.
        axes: logical names of the first axes, see `mllm_jax.sharding.logical`; the others are not sharded.
    """

    shape: tuple[int, ...]
    dtype: str = "int32"
    fill: float = 0
    axes: tuple[str, ...] = (ROW, SEQ)

    def empty(self, rows: int | None = None) -> np.ndarray:
        """Returns the empty array, with `rows` rows or all."""
        return np.full(self.shape if rows is None else (rows, *self.shape[1:]), self.fill, self.dtype)


@dataclass(frozen=True)
class BatchSpec(Mapping[str, ArraySpec]):
    """Every array of a batch by name: the only list of a batch's keys.

    Pipeline, planner, `init`, precomputed values, inference and the transfer to devices read it.
    """

    arrays: Mapping[str, ArraySpec] = field(default_factory=dict)

    def __getitem__(self, name: str) -> ArraySpec:
        return self.arrays[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.arrays)

    def __len__(self) -> int:
        return len(self.arrays)

    def __or__(self, more: Mapping[str, ArraySpec]) -> BatchSpec:
        return BatchSpec({**self.arrays, **more})

    def without(self, *names: str) -> BatchSpec:
        return BatchSpec({name: spec for name, spec in self.arrays.items() if name not in names})

    def empty(self, rows: int | None = None) -> dict[str, np.ndarray]:
        """Returns an empty batch, which `init` traces."""
        return {name: spec.empty(rows) for name, spec in self.arrays.items()}

    def abstract(self) -> dict[str, Any]:
        """Returns shapes and dtypes without data."""
        import jax

        return {name: jax.ShapeDtypeStruct(spec.shape, spec.dtype) for name, spec in self.arrays.items()}

    def check(self, batch: Mapping[str, Any]) -> None:
        """Refuses a batch with an undeclared name, or with arrays of another size per row.

        Raises:
            DataError: the batch is wrong; the error names all such arrays.
        """
        wrong = [f"{name}, which is not declared" for name in batch if name not in self.arrays]
        wrong += [
            f"{name} {list(batch[name].shape)}, declared as {list(spec.shape)}"
            for name, spec in self.arrays.items()
            if name in batch and tuple(batch[name].shape[1:]) != spec.shape[1:]
        ]
        if wrong:
            raise DataError(f"a batch with {'; '.join(wrong)}", f"the arrays {sorted(self.arrays)}", "correct it")


def text_spec(rows: int, length: int, *, width: int = 1, axes: int = 1) -> BatchSpec:
    """Returns the arrays of text that every batch has.

    Args:
        width: the most media tokens of the weighted sum at one position.
        axes: numbers of a position: 3 for M-RoPE.
    """
    row = (rows, length)
    spec = BatchSpec(
        dict(
            tokens=ArraySpec(row),
            positions=ArraySpec(row if axes == 1 else (*row, axes)),
            segments=ArraySpec(row),
            media_index=ArraySpec(row if width == 1 else (*row, width), fill=-1),
            loss_weights=ArraySpec(row, "float32"),
        )
    )
    return spec if width == 1 else spec | dict(media_weights=ArraySpec((*row, width), "float32"))


def target_spec(rows: int, length: int) -> BatchSpec:
    """Returns the arrays of an encoder-decoder's targets."""
    return BatchSpec({f"decoder_{name}": ArraySpec((rows, length)) for name in ("tokens", "segments", "positions")})


def images_spec(rows: int, slots: int, side: int, channels: int = 3) -> BatchSpec:
    """Returns the array of images as bytes, a tile in each slot; none if there are no slots."""
    shape = (rows, slots, side, side, channels)
    return BatchSpec(dict(images=ArraySpec(shape, "uint8", axes=(ROW, SLOTS))) if slots else {})


def sounds_spec(rows: int, slots: int, inputs: tuple[int, ...]) -> BatchSpec:
    """Returns the arrays of an encoder's inputs for sounds, and masks of their valid steps; none without slots.

    Args:
        inputs: shape of one sound, (samples,) or (mel, frames).
    """
    spec = dict(
        sounds=ArraySpec((rows, slots, *inputs), "float32", axes=(ROW, SLOTS)),
        masks=ArraySpec((rows, slots, inputs[-1]), axes=(ROW, SLOTS)),
    )
    return BatchSpec(spec if slots else {})


def instruction_spec(rows: int, slots: int, length: int) -> BatchSpec:
    """Returns the arrays of the instruction that a projector reads for each slot."""
    read = ArraySpec((rows, slots, length), axes=(ROW, SLOTS))
    return BatchSpec(dict(query_tokens=read, query_segments=read))


def targets_spec(
    modality: str, rows: int, slots: int, target: tuple[tuple[int, ...], str], signals: int, length: int
) -> BatchSpec:
    """Returns the arrays for media that the model produces; none without slots.

    Args:
        target: shape and dtype of one medium as the generator learns it.
        signals: signal tokens of one medium: `<modality>_signals` has their positions in the row, -1 in empty slots.
            `<modality>_empty` has the ids of an empty caption.
        length: of a caption's ids.
    """
    media, (shape, dtype) = (rows, slots), target
    spec = dict(
        targets=ArraySpec((*media, *shape), dtype, axes=(ROW, SLOTS)),
        captions=ArraySpec((*media, length), axes=(ROW, SLOTS)),
        signals=ArraySpec((*media, signals), fill=-1, axes=(ROW, SLOTS)),
        empty=ArraySpec((rows, length), axes=(ROW,)),
    )
    return BatchSpec({f"{modality}_{name}": array for name, array in spec.items()} if slots else {})


def assemble(
    packed: Sequence[Sequence[Any]], spec: BatchSpec, layout: Any, slots: Mapping[str, int]
) -> dict[str, np.ndarray]:
    """Builds a batch whose rows hold several examples each.

    Args:
        packed: the examples of each row, `mllm_jax.data.processing.media.Encoded`, which fit into it.
        spec: of the batch; `packed` gives the number of rows.
        layout: the model's.
        slots: of a row, by modality.

    Returns:
        The arrays of `spec`.
    """
    collated = layout.collate([[m for e in row for m in e.media] for row in packed], slots)
    texts = spec.without(*collated.arrays)
    out = texts.empty(len(packed)) | collated.arrays
    for r, row in enumerate(packed):
        cursor = _Cursor()
        for e in row:
            first = collated.first[r][cursor.media : cursor.media + len(e.media)]
            _write_text(out, r, cursor, e, e.row.media_index(first, collated.newline), layout.positions(e.row, e.media))
            _write_signals(out, r, cursor, e)
            if e.target is not None:
                _write_target(out, r, cursor, e)
            if e.instruction is not None:
                here = slice(cursor.slot, cursor.slot + e.slots.get("image", 0))
                out["query_tokens"][r, here, : len(e.instruction)] = e.instruction
                out["query_segments"][r, here, : len(e.instruction)] = 1
            cursor = cursor.after(e)
    return out


@dataclass(frozen=True)
class _Cursor:
    """The offsets of a row's next example."""

    text: int = 0
    target: int = 0
    segment: int = 0
    media: int = 0
    slot: int = 0  # of images
    produced: Mapping[str, int] = field(default_factory=dict)  # by the name of their slots

    def after(self, e: Any) -> _Cursor:
        return replace(
            self,
            text=self.text + len(e.tokens),
            target=self.target + (0 if e.target is None else len(e.target)),
            segment=self.segment + (1 if e.segments is None else int(e.segments[-1])),
            media=self.media + len(e.media),
            slot=self.slot + e.slots.get("image", 0),
            produced={name: self.produced.get(name, 0) + count for name, count in e.slots.items()},
        )


def _write_text(out, r: int, cursor: _Cursor, e: Any, index: np.ndarray, positions: np.ndarray) -> None:
    here = slice(cursor.text, cursor.text + len(e.tokens))
    out["tokens"][r, here] = e.tokens
    out["positions"][r, here] = positions if e.segments is None else _from_each_start(e.segments)
    out["segments"][r, here] = cursor.segment + (1 if e.segments is None else e.segments)
    if "media_weights" in out:
        width = index.shape[1]
        out["media_index"][r, here] = index[:, :1]  # the entries after its own have no weight
        out["media_index"][r, here, :width], out["media_weights"][r, here, :width] = index, e.row.weights
    elif index.shape[1] == 1:
        out["media_index"][r, here] = index[:, 0]
    else:
        raise DataError(
            f"positions that hold sums of {index.shape[1]} media tokens",
            "a batch with media_weights",
            "declare their width in the model's batch_spec (`neighbours` of its config)",
        )
    if e.target is None and "loss_weights" in out:
        out["loss_weights"][r, here] = e.loss_weights


def _write_signals(out, r: int, cursor: _Cursor, e: Any) -> None:
    """Writes the positions of the signal tokens of media that the model produces."""
    taken: Counter[str] = Counter()
    for number, medium in enumerate(e.media):
        name = f"{medium.modality.removesuffix('_targets')}_signals"
        if medium.signals is None or not medium.slots or name not in out:
            continue
        slot = cursor.produced.get(medium.modality, 0) + taken[name]
        positions = np.flatnonzero(e.row.owners == number)[medium.signals]
        out[name][r, slot, : len(positions)] = cursor.text + positions
        taken[name] += medium.slots


def _write_target(out, r: int, cursor: _Cursor, e: Any) -> None:
    """Writes the decoder's target, in the segment of its text in the encoder."""
    here = slice(cursor.target, cursor.target + len(e.target))
    out["decoder_tokens"][r, here] = e.target
    out["decoder_segments"][r, here] = cursor.segment + 1
    if "decoder_positions" in out:
        out["decoder_positions"][r, here] = np.arange(len(e.target))
    if "loss_weights" in out:
        out["loss_weights"][r, here] = e.loss_weights


def _from_each_start(segments: np.ndarray) -> np.ndarray:
    """Returns positions that count from 0 in each segment."""
    return np.arange(len(segments)) - np.searchsorted(segments, segments)
