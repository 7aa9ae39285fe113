"""The rows of batches, of few sizes, so that compiled programs are shared."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from mllm_jax.errors import ConfigError
from mllm_jax.generation.program import bucket


def padded_slots(slots: Mapping[str, int], config: Any) -> dict[str, int]:
    """Pads a row's slots for media to 1, 2, 3, 4, 6, 8, 12, ..., so that rows share compiled programs.

    Args:
        config: of the model; an encoder that packs patches takes its own multiples.
    """
    branches = {modality: config.branch(modality) for modality in sorted(slots)}
    units = {modality: b.encoder.merge_unit if b.packed else 1 for modality, b in branches.items()}
    return {modality: unit * bucket(-(-slots[modality] // unit), least=1) for modality, unit in units.items()}


def in_batches(sizes: Sequence[tuple[dict[str, int], int]], batch_size: int) -> Iterator[tuple[list[int], int]]:
    """Groups examples with equal media and similar lengths, so that shapes repeat.

    Args:
        sizes: slots and length of each example.

    Yields:
        For each batch, the indices of its examples and its number of rows.
    """
    if batch_size < 1:
        raise ConfigError(f"batch_size {batch_size}", "at least 1", "change batch_size")
    order = sorted(range(len(sizes)), key=lambda i: (sorted(sizes[i][0].items()), sizes[i][1]))
    while order:
        slots = sizes[order[0]][0]
        chunk = [i for i in order[:batch_size] if sizes[i][0] == slots]
        order = order[len(chunk) :]
        yield chunk, rows_for(len(chunk), batch_size)


def rows_for(count: int, batch_size: int) -> int:
    """Returns the number of rows of a batch: one of few sizes, at most what is needed or wanted."""
    if batch_size < 1:
        raise ConfigError(f"batch_size {batch_size}", "at least 1", "change batch_size")
    return min(batch_size, 1 << max(count - 1, 0).bit_length())
