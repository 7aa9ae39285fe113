"""A batch of prompts to answers: the loop on the host around the engine, and tokens to text while they come."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np

from mllm_jax.generation.beam import BeamSearch
from mllm_jax.generation.decode_step import Batch
from mllm_jax.generation.engine import Engine, Rows, bucket
from mllm_jax.generation.options import Answer, Options
from mllm_jax.generation.sampling import Sampling
from mllm_jax.sharding.hosts import fetch

CHUNK = 4  # tokens between two looks at the answer, when streaming
CHUNK_OF_STOP_STRINGS = 16  # when only stop strings have to be looked for
UNFINISHED = "\ufffd"  # what a tokenizer gives for the bytes of a character that are not all there

T = TypeVar("T")
Decode = Callable[[Sequence[int]], str]


@dataclass(frozen=True)
class Request:
    """What is asked of a batch.

    Attributes:
        limits: int[n] tokens that each prompt may get; n may be smaller than the number of rows.
        indices: int[n] each prompt's place in the caller's list, which its random numbers hang on.
        stops: all ids that end an answer.
        decode: ids to text, spaces kept.
    """

    limits: Sequence[int]
    indices: Sequence[int]
    stops: tuple[int, ...]
    decode: Decode
    sampling: Sampling
    options: Options


class Answers:
    """Runs requests on an engine."""

    def __init__(self, engine: Engine):
        self.engine, self.beams = engine, BeamSearch(engine)

    def complete(self, batch: Batch, request: Request) -> list[Answer]:
        """The completions of a batch."""
        if request.options.num_beams > 1:
            return self._search(batch, request)
        chunk = CHUNK_OF_STOP_STRINGS if request.options.stop_strings else request.options.max_new_tokens
        return drain(self.stream(batch, request, chunk))

    def stream(self, batch: Batch, request: Request, chunk: int = CHUNK) -> Generator[list[str], None, list[Answer]]:
        """Yields what each prompt's text gains, after every `chunk` tokens; returns the completions."""
        options, sampling = request.options, request.sampling
        rows, new = self._rows(batch, request)
        streams = [TextStream(request.decode, options.stop_strings) for _ in request.limits]
        progress = self.engine.start(batch, rows, new, sampling, options.logprobs)
        while True:
            tokens, counts, ended = (fetch(x).copy() for x in (progress.tokens, progress.counts, progress.ended))
            pieces = []
            for row, stream in enumerate(streams):
                piece = stream.push(_body(tokens[row, : counts[row]], request.stops)[len(stream.ids) :])
                pieces.append(piece + stream.finish() if ended[row] else piece)
                ended[row] |= stream.stopped
            yield pieces
            if ended.all():
                break
            progress = progress.replace(ended=self.engine.place(ended))
            progress = self.engine.advance(progress, rows, int(progress.step) + chunk, sampling)
        logprobs = fetch(progress.logprobs) if options.logprobs else [None] * len(streams)
        return [_completion(s, tokens[r, : counts[r]], logprobs[r], request) for r, s in enumerate(streams)]

    def _search(self, batch: Batch, request: Request) -> list[Answer]:
        rows, new = self._rows(batch, request)
        found = self.beams.run(batch, rows, new, len(request.stops), request.sampling, request.options)
        tokens, lengths = (fetch(x) for x in found)
        streams = [TextStream(request.decode) for _ in request.limits]
        for row, stream in enumerate(streams):
            stream.push(_body(tokens[row, : lengths[row]], request.stops))
        return [_completion(s, tokens[r, : lengths[r]], None, request) for r, s in enumerate(streams)]

    def _rows(self, batch: Batch, request: Request) -> tuple[Rows, int]:
        count = batch["tokens"].shape[0]
        limits, indices = np.zeros(count, np.int32), np.zeros(count, np.int32)
        limits[: len(request.limits)], indices[: len(request.indices)] = request.limits, request.indices
        return self.engine.rows(limits, indices, request.stops, request.sampling), bucket(max(request.limits))


def drain(stream: Generator[object, None, T]) -> T:
    """Runs a generator to its end and gives what it returns."""
    while True:
        try:
            next(stream)
        except StopIteration as end:
            return end.value


def _body(ids: np.ndarray, stops: tuple[int, ...]) -> np.ndarray:
    """The tokens of an answer without the one that ended it."""
    return ids[:-1] if len(ids) and ids[-1] in stops else ids


def _completion(stream: TextStream, ids: np.ndarray, logprobs: np.ndarray | None, request: Request) -> Answer:
    body = _body(ids, request.stops)
    kept = tuple(stream.ids if stream.stopped else body.tolist())
    return Answer(
        text=stream.text if stream.stopped else request.decode(kept),
        tokens=kept,
        reason="stop" if stream.stopped or len(body) < len(ids) else "length",
        logprobs=None if logprobs is None else tuple(logprobs[: len(kept)].tolist()),
    )


class TextStream:
    """The text of one answer, piece by piece; the pieces together are the text.

    A piece is held back while its last character lacks bytes, and while its end may be the beginning of a stop string.

    Args:
        decode: ids to text, spaces kept as they are.
        stop_strings: the text ends before the first place where one of them stands.
    """

    def __init__(self, decode: Decode, stop_strings: Sequence[str] = ()):
        self._decode, self._stops = decode, tuple(stop_strings)
        self.ids: list[int] = []
        self.text = ""  # what is decoded, held back or not
        self.stopped = False
        self._given = 0  # characters handed out
        # Ids before `_start` are settled; those from `_start` to `_read` are decoded again with what follows, as some
        # tokenizers write a token differently at the beginning of a text.
        self._start = self._read = 0
        self._ahead = 0  # characters of what follows `_read` that are in the text, as a later one lacks bytes

    def push(self, ids: Iterable[int]) -> str:
        """Takes the next tokens, up to the one that completes a stop string; gives the text that is safe to show."""
        ids = [int(i) for i in ids]
        each = 1 if self._stops else max(len(ids), 1)  # one by one only where the place matters
        for i in range(0, len(ids), each):
            if not self.stopped:
                self.ids += ids[i : i + each]
                self._grow(final=False)
        return self._give(len(self.text) if self.stopped else len(self.text) - self._suspects())

    def finish(self) -> str:
        """What was held back, as no token follows."""
        if not self.stopped:
            self._grow(final=True)
        return self._give(len(self.text))

    def _grow(self, final: bool) -> None:
        before = self._decode(self.ids[self._start : self._read])
        after = self._decode(self.ids[self._start :])
        whole = after if final else after.rstrip(UNFINISHED)
        new = whole[len(before) + self._ahead :]
        if new:
            self._ahead += len(new)
        if self._ahead and whole == after:
            self._start, self._read, self._ahead = self._read, len(self.ids), 0
        searched = max(0, len(self.text) - max(map(len, self._stops), default=0))
        self.text += new
        places = [place for stop in self._stops if (place := self.text.find(stop, searched)) >= 0]
        if places:
            self.text, self.stopped = self.text[: min(places)], True

    def _suspects(self) -> int:
        """How many characters at the end begin a stop string."""
        ends = (n for stop in self._stops for n in range(1, len(stop)) if self.text.endswith(stop[:n]))
        return max(ends, default=0)

    def _give(self, until: int) -> str:
        piece = self.text[self._given : until]
        self._given = max(self._given, until)
        return piece
