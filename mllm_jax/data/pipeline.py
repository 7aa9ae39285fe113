"""Batches as a function of (seed, step): measure the sources once, plan in integers, build the rows asked for."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from flax.core import FrozenDict

from mllm_jax.data.batch import BatchSpec
from mllm_jax.data.message import Text
from mllm_jax.data.packing import PackingPlan, Stream
from mllm_jax.data.processing.media import Encoded, Lazy
from mllm_jax.data.retry import Patience, patiently
from mllm_jax.data.source import Source
from mllm_jax.data.units import in_words
from mllm_jax.errors import ConfigError, DataError
from mllm_jax.files import write_atomic

LAYOUTS = ("conversation", "caption")
LEARN = ("answers", "all")
_SLOTS = "slots_"  # what the names of stored slots begin with

T = TypeVar("T")


@dataclass(frozen=True)
class Weighted:
    """A source's config (anything with `build() -> Source`) and its share of the examples."""

    source: Any
    weight: float = 1.0


@dataclass(frozen=True)
class Mixture:
    """What a stage reads, and the one shape of its batches.

    Attributes:
        rows, length: rows of a global batch, positions of a row.
        slots: for media in a row, by modality, such as {"image": 4}: images or tiles, or patches; {}: text only.
        layout: "conversation" (questions and answers, packed) or "caption" (one picture and its captions a row).
        captions: in the caption layout, the most a picture may have.
        learn: what carries loss in conversations: the answers, or all the text.
        group: in the caption layout, so many neighbouring examples of a source stay together in a batch: hard negatives
            for contrastive training where the source puts like beside like.
        max_bad_share: share of examples that may be unusable before the run refuses to start.
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


@dataclass(frozen=True)
class Measured:
    """Length, and media slots by modality, of every example of a source; unusable ones have length 0 and a reason."""

    lengths: np.ndarray
    slots: Mapping[str, np.ndarray]
    bad: tuple[tuple[int, str], ...] = ()
    dropped_turns: int = 0


class Pipeline:
    """The batches of one stage.

    Args:
        processor: lays examples out and packs rows of them, see `mllm_jax.models.processor.Processor`. Slots are those
            of the model's layout: tiles, or patches.
        cache_dir: where measured lengths are kept, beside the data; None keeps nothing.
        patience: how long a source that fails to read is tried.
    """

    def __init__(
        self,
        mixture: Mixture,
        processor: Any,
        *,
        seed: int,
        cache_dir: Path | None = None,
        patience: Patience = Patience(),
    ):
        self.patience, self.mixture, self.processor = patience, mixture, processor
        self.sources: list[Source] = [w.source.build() for w in mixture.sources]
        self.measured = [self._measure(number, cache_dir) for number in range(len(self.sources))]
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
        """Lays out one example, whose arrays are read with patience too; a DataError names it."""
        encoded = self._read(partial(self._encode, source, index), source, index)

        def patient(arrays: Mapping[str, np.ndarray]) -> Lazy:
            return Lazy(tuple(arrays), lambda name: self._read(partial(arrays.__getitem__, name), source, index))

        return replace(encoded, media=[replace(medium, arrays=patient(medium.arrays)) for medium in encoded.media])

    def _encode(self, source: int, index: int) -> Encoded:
        example, m = self.sources[source].example(index), self.mixture
        if m.layout == "caption":
            return self.processor.encode_captions(example, m.length, m.captions)
        return self.processor.encode(example, m.length, m.learn)

    def _read(self, read: Callable[[], T], source: int, index: int) -> T:
        """Reads something of an example; a DataError names it.

        Raises:
            ReadError: the source cannot be read for the moment, which is no fault of the example.
        """
        name = f"{self.sources[source].name}[{index}]"
        try:
            return patiently(read, name, self.patience)
        except DataError as error:
            raise DataError(f"{name}: {error.given}", error.expected, error.todo) from error

    def _measure(self, number: int, cache_dir: Path | None) -> Measured:
        source, m = self.sources[number], self.mixture
        settings = [self.processor.fingerprint(), m.length, m.layout, m.captions]
        key = hashlib.sha256(json.dumps([source.fingerprint(), *settings]).encode()).hexdigest()[:24]
        file = cache_dir / f"{key}.npz" if cache_dir is not None and m.max_bad_share == 0 else None
        if file is not None and file.is_file():
            with np.load(file) as stored:
                slots = {name.removeprefix(_SLOTS): stored[name] for name in stored if name.startswith(_SLOTS)}
                return Measured(stored["lengths"], slots, (), int(stored["dropped_turns"]))
        lengths = np.zeros(len(source), np.int64)
        slots = {modality: np.zeros_like(lengths) for modality in m.slots}
        bad: list[tuple[int, str]] = []
        dropped = 0
        for index in range(len(source)):
            try:
                encoded = self.encode(number, index)
                if any(count > m.slots.get(modality, 0) for modality, count in encoded.slots.items()):
                    unit = self.processor.layout.unit
                    given = f"{source.name}[{index}]: {in_words(encoded.slots, unit)}"
                    raise DataError(given, f"at most {in_words(m.slots, unit)} a row", "raise the mixture's slots")
                if m.max_bad_share > 0:
                    for medium in encoded.media:
                        dict(medium.arrays)  # some are decoded only when they are read
            except DataError as error:
                bad.append((index, str(error)))
                continue
            lengths[index] = encoded.length
            for modality, count in encoded.slots.items():
                slots[modality][index] = count
            dropped += encoded.dropped_turns
        if len(bad) > m.max_bad_share * len(source):
            first = "\n".join(reason for _, reason in bad[:5])
            raise DataError(
                f"{source.name}: {len(bad)} of {len(source)} examples cannot be used, the first:\n{first}",
                f"at most {m.max_bad_share:.2%}",
                "mend the records, or raise the mixture's max_bad_share",
            )
        if file is not None:
            file.parent.mkdir(parents=True, exist_ok=True)
            arrays = dict(lengths=lengths, dropped_turns=dropped) | {f"{_SLOTS}{m}": n for m, n in slots.items()}
            write_atomic(file, lambda opened: np.savez(opened, **arrays))
        return Measured(lengths, slots, tuple(bad), dropped)

    def batch(self, step: int, rows: Sequence[int] | None = None) -> dict[str, np.ndarray]:
        """The batch of a step, or only the given rows of it: the arrays of `spec`.

        Raises:
            DataError: an image cannot be read, by source, index and reason.
        """
        plan = self.plan.step(step)
        rows = range(self.mixture.rows) if rows is None else rows
        packed = [[self._planned(source, index) for source, index in plan[row]] for row in rows]
        return self.processor.pack(packed, self.mixture.length, self.mixture.slots)

    def _planned(self, source: int, index: int) -> Encoded:
        """An example as the plan knows it. Raises DataError: it is of another length than when it was measured."""
        e = self.encode(source, index)
        if e.length != self.measured[source].lengths[index]:
            raise DataError(
                f"{self.sources[source].name}[{index}]: {e.length} tokens, measured as "
                f"{self.measured[source].lengths[index]}",
                "data that does not change while its fingerprint stays",
                "delete the stored lengths beside the data, or make the source's fingerprint tell the change",
            )
        return e

    def iterate(self, start: int, stop: int, rows: Sequence[int] | None = None, threads: int = 2) -> Iterator[dict]:
        """The batches of steps start..stop-1, read ahead by grain's threads."""
        import grain

        steps = grain.MapDataset.range(start, stop).map(lambda step: self.batch(step, rows))
        options = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=2 * threads)
        return iter(steps.to_iter_dataset(options))

    def describe(self, step: int) -> str:
        """The examples of a step by source and index: what a person needs to find a bad batch."""
        rows = self.plan.step(step)
        return "; ".join(
            f"row {r}: " + ", ".join(f"{self.sources[s].name}[{i}]" for s, i in row) for r, row in enumerate(rows)
        )


def training_texts(sources: Sequence[Source], limit: int = 4000) -> Iterator[str]:
    """Every text of evenly spaced examples: what a tokenizer is trained on.

    Records that cannot be used are passed over: `Pipeline` names and counts them, and refuses more than its share.
    """
    for source in sources:
        for index in np.unique(np.linspace(0, len(source) - 1, min(limit, len(source))).astype(int)):
            try:
                example = source.example(int(index))
            except DataError:
                continue
            yield from (part.text for message in example.messages for part in message.parts if isinstance(part, Text))
