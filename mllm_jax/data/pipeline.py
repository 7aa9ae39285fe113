"""Batches as a function of (seed, step): measure the sources once, plan in integers, build the rows asked for."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from mllm_jax.data.dialogues import EncodedDialogue, pack_dialogues
from mllm_jax.data.examples import Source
from mllm_jax.data.packing import PackingPlan, Stream
from mllm_jax.data.retry import Patience, patiently
from mllm_jax.data.templates import Encoded, encode_captions, encode_conversation
from mllm_jax.data.tokenizer import Tokenizer
from mllm_jax.errors import ConfigError, DataError
from mllm_jax.files import write_atomic

LAYOUTS = ("conversation", "caption")
LEARN = ("answers", "all")

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
        rows, length, slots: rows of a global batch, places of a row, media slots of a row (0: text only).
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
    slots: int = 4
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
        if self.group < 1 or self.rows % self.group or (self.group > 1 and self.layout != "caption"):
            raise ConfigError(
                f"groups of {self.group} in {self.rows} rows, layout {self.layout!r}",
                "a group that divides the rows, and the caption layout",
                "change the mixture's group",
            )


@dataclass(frozen=True)
class Measured:
    """Length and pictures of every example of a source; unusable ones have length 0 and a reason."""

    lengths: np.ndarray
    images: np.ndarray
    bad: tuple[tuple[int, str], ...] = ()
    dropped_turns: int = 0


class Pipeline:
    """The batches of one stage.

    Args:
        media_tokens: places that one picture takes, where every picture takes as many.
        dialogues: instead of `media_tokens`, lays conversations out as a named model has them; see
            `mllm_jax.models.dialogue`. Lengths are then measured with the pictures, and slots are those of its layout:
            tiles, or patches.
        cache_dir: where measured lengths are kept, beside the data; None keeps nothing.
        patience: how long a source that fails to read is tried.
    """

    def __init__(
        self,
        mixture: Mixture,
        tokenizer: Tokenizer | None,
        *,
        media_tokens: int | None = None,
        dialogues: Any = None,
        seed: int,
        cache_dir: Path | None = None,
        patience: Patience = Patience(),
    ):
        self.patience = patience
        self.mixture, self.tokenizer, self.media_tokens, self.dialogues = mixture, tokenizer, media_tokens, dialogues
        if (media_tokens is None) == (dialogues is None) or (dialogues and mixture.layout != "conversation"):
            raise ConfigError(
                f"media_tokens {media_tokens}, dialogues {dialogues}, layout {mixture.layout!r}",
                "one of the two, and conversations for a named model",
                "change the mixture's layout, or the pipeline's arguments",
            )
        self.sources: list[Source] = [w.source.build() for w in mixture.sources]
        self.measured = [self._measure(source, cache_dir) for source in self.sources]
        self.plan = PackingPlan(
            [Stream(m.lengths, m.images, w.weight) for m, w in zip(self.measured, mixture.sources, strict=True)],
            rows=mixture.rows,
            length=mixture.length,
            slots=mixture.slots,
            seed=seed,
            packed=mixture.layout == "conversation",
            group=mixture.group,
        )

    def encode(self, source: int, index: int) -> Encoded | EncodedDialogue:
        """One example as ids; a DataError is told which it was."""
        m = self.mixture
        with self._naming(source, index):
            conversation = self._read(self.sources[source].conversation, source, index)
            if self.dialogues is not None:
                images = self._read(self.sources[source].images, source, index)
                return self.dialogues.encode(conversation, images, m.length, m.learn)
            if m.layout == "caption":
                return encode_captions(conversation, self.tokenizer, self.media_tokens, m.length, m.captions)
            return encode_conversation(conversation, self.tokenizer, self.media_tokens, m.length, m.learn)

    def images(self, source: int, index: int) -> list[np.ndarray]:
        """The pictures of one example; a DataError is told which it was."""
        with self._naming(source, index):
            return self._read(self.sources[source].images, source, index)

    def _read(self, read: Callable[[int], T], source: int, index: int) -> T:
        """Raises ReadError: the source cannot be read for the moment, which is no fault of the example."""
        return patiently(partial(read, index), f"{self.sources[source].name}[{index}]", self.patience)

    @contextmanager
    def _naming(self, source: int, index: int) -> Iterator[None]:
        try:
            yield
        except DataError as error:
            name = self.sources[source].name
            raise DataError(f"{name}[{index}]: {error.given}", error.expected, error.todo) from error

    def _measure(self, source: Source, cache_dir: Path | None) -> Measured:
        number = self.sources.index(source)
        told = self.tokenizer if self.dialogues is None else self.dialogues
        settings = [
            told.fingerprint(),
            self.media_tokens,
            self.mixture.length,
            self.mixture.layout,
            self.mixture.captions,
        ]
        key = hashlib.sha256(json.dumps([source.fingerprint(), *settings]).encode()).hexdigest()[:24]
        file = cache_dir / f"{key}.npz" if cache_dir is not None and self.mixture.max_bad_share == 0 else None
        if file is not None and file.is_file():
            with np.load(file) as stored:
                return Measured(stored["lengths"], stored["images"], (), int(stored["dropped_turns"]))
        lengths, images = np.zeros(len(source), np.int64), np.zeros(len(source), np.int64)
        bad: list[tuple[int, str]] = []
        dropped = 0
        for index in range(len(source)):
            try:
                encoded = self.encode(number, index)
                if encoded.slots > self.mixture.slots:
                    given = (
                        f"{source.name}[{index}]: pictures for {encoded.slots} slots in a row of {self.mixture.slots}"
                    )
                    raise DataError(given, "at most as many as slots", "raise the mixture's slots")
                if self.mixture.max_bad_share > 0:
                    self.images(number, index)
            except DataError as error:
                bad.append((index, str(error)))
                continue
            lengths[index], images[index] = encoded.length, encoded.slots
            dropped += encoded.dropped_turns
        if len(bad) > self.mixture.max_bad_share * len(source):
            first = "\n".join(reason for _, reason in bad[:5])
            raise DataError(
                f"{source.name}: {len(bad)} of {len(source)} examples cannot be used, the first:\n{first}",
                f"at most {self.mixture.max_bad_share:.2%}",
                "mend the records, or raise the mixture's max_bad_share",
            )
        if file is not None:
            file.parent.mkdir(parents=True, exist_ok=True)
            arrays = dict(lengths=lengths, images=images, dropped_turns=dropped)
            write_atomic(file, lambda opened: np.savez(opened, **arrays))
        return Measured(lengths, images, tuple(bad), dropped)

    def shapes(self) -> dict[str, tuple[tuple[int, ...], np.dtype]]:
        """Shape and dtype of every array of a global batch."""
        m = self.mixture
        if self.dialogues is not None:
            example = self.batch(0, rows=[0])
            return {name: ((m.rows, *array.shape[1:]), array.dtype) for name, array in example.items()}
        text = (m.rows, m.length)
        shapes = {name: (text, np.dtype(np.int32)) for name in ("tokens", "positions", "segments", "media_index")}
        shapes["loss_weights"] = (text, np.dtype(np.float32))
        if m.slots:
            shapes["images"] = ((m.rows, m.slots, self.image_size, self.image_size, 3), np.dtype(np.uint8))
        return shapes

    @property
    def image_size(self) -> int:
        """Side of the pictures, equal for all sources of the mixture that have any."""
        measured = zip(self.mixture.sources, self.measured, strict=True)
        sizes = {weighted.source.image_size for weighted, m in measured if m.images.any()}
        if len(sizes) != 1:
            raise ConfigError(
                f"sources with picture sizes {sorted(sizes)}", "one size for a mixture", "make them equal"
            )
        return sizes.pop()

    def batch(self, step: int, rows: Sequence[int] | None = None) -> dict[str, np.ndarray]:
        """The batch of a step, or only the given rows of it.

        Returns:
            tokens, positions, segments, media_index int32[R, S]; loss_weights float32[R, S];
            images uint8[R, M, H, W, 3] where the mixture has slots.

        Raises:
            DataError: a picture cannot be read, by source, index and reason.
        """
        plan = self.plan.step(step)
        rows = range(self.mixture.rows) if rows is None else rows
        if self.dialogues is not None:
            packed = [[self._planned(source, index) for source, index in plan[row]] for row in rows]
            m, told = self.mixture, self.dialogues
            return pack_dialogues(packed, told.layout, m.length, m.slots, decodes=told.decodes)
        out = {name: np.zeros((len(rows), *shape[1:]), dtype) for name, (shape, dtype) in self.shapes().items()}
        out["media_index"] -= 1
        out["tokens"] += self.tokenizer.pad
        for r, row in enumerate(rows):
            place, slot, segment = 0, 0, 0
            for source, index in plan[row]:
                e = self._planned(source, index)
                span = slice(place, place + len(e.tokens))
                out["tokens"][r, span] = e.tokens
                segments, positions = e.places
                out["positions"][r, span] = positions
                out["segments"][r, span] = segment + segments
                out["loss_weights"][r, span] = e.loss_weights
                shifted = e.media_index + slot * self.media_tokens
                out["media_index"][r, span] = np.where(e.media_index >= 0, shifted, -1)
                if e.num_images:
                    out["images"][r, slot : slot + e.num_images] = self.images(source, index)
                place, slot, segment = place + len(e.tokens), slot + e.num_images, segment + int(segments[-1])
        return out

    def _planned(self, source: int, index: int) -> Encoded | EncodedDialogue:
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
    """Every context, question and answer of evenly spaced examples: what a tokenizer is trained on.

    Records that cannot be used are passed over: `Pipeline` names and counts them, and refuses more than its share.
    """
    for source in sources:
        for index in np.unique(np.linspace(0, len(source) - 1, min(limit, len(source))).astype(int)):
            try:
                conversation = source.conversation(int(index))
            except DataError:
                continue
            if conversation.context:
                yield conversation.context
            for turn in conversation.turns:
                if turn.question:
                    yield turn.question
                yield turn.answer
