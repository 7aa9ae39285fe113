"""A batch of prompts to completions: the loop on the host around the engine."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np

from mllm_jax.generation.beam import BeamSearch
from mllm_jax.generation.engine import Engine, Rows, bucket
from mllm_jax.generation.options import Answer, Options
from mllm_jax.generation.sampling import Sampling
from mllm_jax.generation.steps import Batch
from mllm_jax.generation.text import Decode, TextStream
from mllm_jax.sharding.hosts import fetch

CHUNK = 4  # tokens between two looks at the answer, when streaming
CHUNK_OF_STOP_STRINGS = 16  # when only stop strings have to be looked for

T = TypeVar("T")


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
