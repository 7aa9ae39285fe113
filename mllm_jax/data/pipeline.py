"""Batches as a function of (seed, step): measures the sources once, plans in integers, builds the rows asked for."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from flax.core import FrozenDict

from mllm_jax.data.batch import BatchSpec
from mllm_jax.data.measure import HowToMeasure, MeasuredLengths, Shows, measure
from mllm_jax.data.message import Text
from mllm_jax.data.packing import PackingPlan, Stream
from mllm_jax.data.processing.media import Encoded
from mllm_jax.data.retry import RetryPolicy
from mllm_jax.data.source import Source
from mllm_jax.data.source_encoder import SourceEncoder
from mllm_jax.errors import ConfigError, DataError
from mllm_jax.sharding.hosts import ALONE, Share

LAYOUTS = ("conversation", "caption")
LEARN = ("answers", "all")


@dataclass(frozen=True)
class Weighted:
    """A source's config (anything with `build() -> Source`) and its share of the examples."""

    source: Any
    weight: float = 1.0


@dataclass(frozen=True)
class Mixture:
    """The sources of a stage, and the shape of its batches.

    Attributes:
        rows, length: rows of a global batch, positions of a row.
        slots: for media in a row, by modality, such as {"image": 4}: images or tiles, or patches; {}: text only.
        layout: "conversation" (questions and answers, packed) or "caption" (one image and its captions per row).
        captions: in the caption layout, the most captions of an image.
        learn: the part of conversations that carries loss: the answers, or all the text.
        group: in the caption layout, number of neighbouring examples of a source that stay together in a batch: hard
            negatives for contrastive training if the source sorts similar examples together.
        max_bad_share: the largest share of unusable examples; with more, the run does not start.
    """

    sources: tuple[Weighted, ...]
    rows: int = 16
    length: int = 256
    slots: Mapping[str, int] = FrozenDict({"image": 4})
    layout: str = "conversation"
    captions: int = 1
    learn: str = "answers"
    group: int = 1
    max_bad_share: float = 0.0

    def __post_init__(self):
        if self.layout not in LAYOUTS:
            raise ConfigError(f"layout {self.layout!r}", f"one of {LAYOUTS}", "change the mixture's layout")
        if self.learn not in LEARN:
            raise ConfigError(f"learn {self.learn!r}", f"one of {LEARN}", "change the mixture's learn")
        if not isinstance(self.slots, Mapping) or any(count < 0 for count in self.slots.values()):
            raise ConfigError(
                f"slots {self.slots!r}", 'counts by modality, such as {"image": 4}', "change the mixture's slots"
            )
        object.__setattr__(self, "slots", FrozenDict(self.slots))
        if self.group < 1 or self.rows % self.group or (self.group > 1 and self.layout != "caption"):
            raise ConfigError(
                f"groups of {self.group} in {self.rows} rows, layout {self.layout!r}",
                "a group that divides the rows, and the caption layout",
                "change the mixture's group",
            )


class Pipeline:
    """The batches of one stage.

    Args:
        processor: lays examples out and packs rows of them, see `mllm_jax.models.processor.Processor`. Slots are those
            of the model's layout: tiles, or patches.
        cache_dir: folder of measured lengths, beside the data; None stores nothing.
        patience: the retries of a source that fails to read.
        workers, hosts, progress: see `HowToMeasure`; every host makes the same pipeline, at the same point.

    Attributes:
        encoders: lay out the examples of each source.
        measured: the positions and slots of each source's examples.
    """

    def __init__(
        self,
        mixture: Mixture,
        processor: Any,
        *,
        seed: int,
        cache_dir: Path | None = None,
        patience: RetryPolicy = RetryPolicy(),
        workers: int | None = None,
        hosts: Share = ALONE,
        progress: Shows | None = None,
    ):
        self.mixture, self.processor = mixture, processor
        self.encoders = encoders(mixture, processor, patience)
        self.sources: list[Source] = [encoder.source for encoder in self.encoders]
        how = HowToMeasure(cache_dir, workers, hosts, progress)
        self.measured: list[MeasuredLengths] = [
            measure(encoder, mixture.slots, max_bad_share=mixture.max_bad_share, how=how) for encoder in self.encoders
        ]
        self.plan = PackingPlan(
            [Stream(m.lengths, m.slots, w.weight) for m, w in zip(self.measured, mixture.sources, strict=True)],
            rows=mixture.rows,
            length=mixture.length,
            slots=mixture.slots,
            seed=seed,
            packed=mixture.layout == "conversation",
            group=mixture.group,
            unit=processor.layout.unit,
        )

    @property
    def spec(self) -> BatchSpec:
        """The arrays of a global batch."""
        return self.processor.spec(self.mixture.rows, self.mixture.length, self.mixture.slots)

    def encode(self, source: int, index: int) -> Encoded:
        """Lays out one example, see `SourceEncoder.encode`."""
        return self.encoders[source].encode(index)

    def batch(self, step: int, rows: Sequence[int] | None = None) -> dict[str, np.ndarray]:
        """Builds the batch of a step, or only the given rows of it: the arrays of `spec`.

        Raises:
            DataError: an image cannot be read; it names source, index and reason.
        """
        plan = self.plan.step(step)
        rows = range(self.mixture.rows) if rows is None else rows
        packed = [[self._planned(source, index) for source, index in plan[row]] for row in rows]
        return self.processor.pack(packed, self.mixture.length, self.mixture.slots)

    def _planned(self, source: int, index: int) -> Encoded:
        """Lays out an example. Raises DataError: its length differs from the measured one."""
        e = self.encode(source, index)
        if e.length != self.measured[source].lengths[index]:
            raise DataError(
                f"{self.sources[source].name}[{index}]: {e.length} tokens, measured as "
                f"{self.measured[source].lengths[index]}",
                "data that does not change while its fingerprint stays the same",
                "delete the stored lengths beside the data, or make the source's fingerprint depend on the change",
            )
        return e

    def iterate(self, start: int, stop: int, rows: Sequence[int] | None = None, threads: int = 2) -> Iterator[dict]:
        """Yields the batches of steps start..stop-1, which grain's threads read ahead."""
        import grain

        steps = grain.MapDataset.range(start, stop).map(lambda step: self.batch(step, rows))
        options = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=2 * threads)
        return iter(steps.to_iter_dataset(options))

    def describe(self, step: int) -> str:
        """Lists the examples of a step by source and index, for a person who looks for a bad batch."""
        rows = self.plan.step(step)
        return "; ".join(
            f"row {r}: " + ", ".join(f"{self.sources[s].name}[{i}]" for s, i in row) for r, row in enumerate(rows)
        )


def encoders(mixture: Mixture, processor: Any, patience: RetryPolicy = RetryPolicy()) -> list[SourceEncoder]:
    """Returns the encoder of each source of a mixture."""
    m = mixture
    how = dict(length=m.length, layout=m.layout, captions=m.captions, learn=m.learn, decodes=m.max_bad_share > 0)
    return [SourceEncoder(w.source, w.source.build(), processor, patience=patience, **how) for w in m.sources]


def training_texts(sources: Sequence[Source], limit: int = 4000) -> Iterator[str]:
    """Yields every text of evenly spaced examples, for the training of a tokenizer.

    Skips records that cannot be used: `Pipeline` reports and counts them, and refuses too large a share.
    """
    for source in sources:
        for index in np.unique(np.linspace(0, len(source) - 1, min(limit, len(source))).astype(int)):
            try:
                example = source.example(int(index))
            except DataError:
                continue
            yield from (part.text for message in example.messages for part in message.parts if isinstance(part, Text))
