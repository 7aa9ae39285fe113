"""Continuous batching: a row whose answer has ended takes the next waiting request."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import count, islice, takewhile
from typing import Any

import numpy as np

from mllm_jax.errors import ConfigError, DataError
from mllm_jax.generation.beam import Rule
from mllm_jax.generation.decode_step import Batch
from mllm_jax.generation.options import Answer, Options
from mllm_jax.generation.program import Asked, Program, Rows, bucket
from mllm_jax.generation.sampling import Sampling
from mllm_jax.generation.streaming import Decode, TextStream
from mllm_jax.sharding.hosts import fetch

CHUNK_OF_STOP_STRINGS = 16  # tokens between two searches for stop strings
SHARE = 4  # rows are filled when 1/SHARE of them are free, so that prompts are read together
STOPS = 8  # end tokens are padded to a multiple of this with NO_TOKEN
NO_TOKEN = -1


@dataclass(frozen=True)
class Request:
    """A prompt and the limits and options of its answer.

    Attributes:
        prompt: an input of the engine's `collate`.
        length: of the prompt in tokens.
        limit: the most tokens of the answer.
        decode: ids to text, spaces kept.
        index: the prompt's position in the caller's list; with the seed it determines a sampled answer.
        stops: all ids that end the answer.
        media: equal for prompts that are read together.
    """

    prompt: Any
    length: int
    limit: int
    decode: Decode
    index: int = 0
    stops: tuple[int, ...] = ()
    options: Options = Options()
    sampling: Sampling = Sampling()
    media: tuple = ()

    @property
    def kind(self) -> tuple:
        """The values that requests answered at the same time have in common."""
        o, stop_width = self.options, -(-max(len(self.stops), 1) // STOPS) * STOPS
        return self.drawn, stop_width, o.logprobs, o.num_beams, o.length_penalty, o.early_stopping

    @property
    def likeness(self) -> tuple:
        """The sort key that groups requests of one padded length and with equal media."""
        return bucket(self.length), self.media

    @property
    def drawn(self) -> Sampling:
        """The sampling without its seed, which is data of each row: another seed compiles nothing."""
        return replace(self.sampling, seed=0)


class Engine:
    """Answers requests on a fixed number of rows.

    An answer depends on its request alone: in float32 its tokens do not depend on the other rows or on when it starts.
    Requests are served in order. One of another kind than those being answered (see `Request.kind`), or a longer one,
    waits until they have ended. Beam search answers up to `slots` requests in one step.

    A prompt that `collate` refuses fails alone: `step` returns the error in place of its answer, and the requests
    that were taken with it are read without it. An error of the device ends the engine.

    Args:
        collate: (prompts, rows, length) -> the arrays of a batch of `rows` rows, prompts first, each `length` long.
        slots: the number of rows.
        longest: the most tokens of a prompt; None is no bound.

    Attributes:
        pieces: the text that each ticket gained in the last step, if the step had a number of tokens.
        decode_steps: the number of decode steps that were computed.
    """

    def __init__(
        self,
        program: Program,
        collate: Callable[[Sequence[Any], int, int], dict[str, np.ndarray]],
        slots: int,
        longest: int | None = None,
    ):
        if slots < 1:
            raise ConfigError(f"batch_size {slots}", "at least 1", "change batch_size")
        self.program, self.collate, self.slots, self.longest = program, collate, slots, longest
        self._together = max(1, slots // SHARE)  # rows that are filled at a time
        self.pieces: dict[int, str] = {}
        self.decode_steps = 0
        self._tickets = count()
        self._waiting: deque[tuple[int, Request]] = deque()
        self._alone: set[int] = set()  # tickets of waiting requests that could not be read with others
        self._running: list[tuple[int, Request, TextStream] | None] = [None] * slots
        self._state: Any = None
        self._rows: Rows | None = None
        self._kind, self._length, self._new = (), 0, 0  # of the requests being answered

    def submit(self, request: Request) -> int:
        """Queues a request.

        Returns:
            Its ticket: the tickets count up by one.

        Raises:
            DataError: the prompt has no tokens or too many, or leaves no room for an answer.
            ConfigError: options contradict one another.
        """
        most = self.longest or request.length
        if not 1 <= request.length <= most or request.limit < 1:
            raise DataError(
                f"a request with {request.length} prompt tokens, for at most {request.limit} new ones",
                "at least one of each" + (f", and prompts of at most {most} tokens" if self.longest else ""),
                "change the prompt or the limit",
            )
        request.options.check(request.sampling)
        self._waiting.append((ticket := next(self._tickets), request))
        return ticket

    def step(self, tokens: int | None = None) -> list[tuple[int, Answer | Exception]]:
        """Reads waiting prompts into free rows and adds their first tokens; without any, adds tokens to all rows.

        Args:
            tokens: the most to add to each answer; None: until rows can be filled again, or until all answers end.

        Returns:
            The tickets that ended, each with its answer or with the error of `collate` for its prompt.
        """
        self.pieces = {}
        if taken := self._next():
            try:
                read = self._batch([request for _, request in taken])
            except Exception as error:
                return self._refused(taken, error)
            if taken[0][1].options.num_beams > 1:
                return self._search(taken, *read)
            self._fill(taken, *read)
        elif any(self._running):
            self._advance(tokens)
        else:
            return []
        return self._look(tokens is not None)

    def answer(self, requests: Iterable[Request]) -> list[Answer]:
        """Returns the answers to requests, in their order; raises the error of the first prompt that cannot be read."""
        tickets, found = [self.submit(request) for request in requests], {}
        while len(found) < len(tickets):
            found |= self.step()
        return [or_raise(found[ticket]) for ticket in tickets]

    @property
    def waiting(self) -> int:
        """The number of requests that wait for a row."""
        return len(self._waiting)

    @property
    def length(self) -> int:
        """The longest prompt that the rows in use can hold; 0 if none is in use."""
        return self._length if any(self._running) else 0

    # ---- which requests are next

    @property
    def _free(self) -> list[int]:
        return [row for row, running in enumerate(self._running) if running is None]

    def _fits(self, request: Request) -> bool:
        return request.kind == self._kind and request.length <= self._length and request.limit <= self._new

    def _wanted_rows(self) -> int:
        """Returns the number of rows that must be free before the next are filled; 0 if no waiting request fits."""
        return min(self._together, len(self._waiting)) if self._waiting and self._fits(self._waiting[0][1]) else 0

    def _next(self) -> list[tuple[int, Request]]:
        """Takes the requests to be read now."""
        free = len(self._free)
        if free == self.slots and self._waiting:
            self._begin()
        if not 0 < self._wanted_rows() <= free:
            return []
        media = self._waiting[0][1].media
        fit = takewhile(lambda waiting: waiting[1].media == media and self._fits(waiting[1]), self._waiting)
        alone = self._waiting[0][0] in self._alone
        taken = list(islice(fit, 1 if alone else free if free == self.slots else self._together))
        for ticket, _ in taken:
            self._waiting.popleft()
            self._alone.discard(ticket)
        return taken

    def _refused(self, taken: list[tuple[int, Request]], error: Exception) -> list[tuple[int, Exception]]:
        """Queues prompts that cannot be read together to be read one by one, so that only bad ones fail."""
        if len(taken) == 1:
            return [(taken[0][0], error)]
        self._alone |= {ticket for ticket, _ in taken}
        self._waiting.extendleft(reversed(taken))
        return []

    def _begin(self) -> None:
        """Chooses the lengths of rows from the requests of the first one's kind that are not much longer."""
        first = self._waiting[0][1]
        alike = [r for _, r in self._waiting if r.kind == first.kind]
        length, new = (2 * bucket(size) for size in (first.length, first.limit))
        alike = [r for r in alike if bucket(r.length) <= length and bucket(r.limit) <= new]
        self._length = bucket(max(r.length for r in alike), self.longest)
        self._kind, self._new = first.kind, bucket(max(r.limit for r in alike))
        self._state = self._rows = None  # frees their memory before other rows are made

    # ---- what runs on the devices

    def _fill(self, taken: list[tuple[int, Request]], batch: Batch, asked: Asked, sizes: dict[str, int]) -> None:
        places, width, program = self._free[: len(taken)], len(asked.limits), self.program
        for place, (ticket, request) in zip(places, taken, strict=True):
            stream = TextStream(request.decode, request.options.stop_strings)
            self._running[place] = ticket, replace(request, prompt=None), stream  # drops its media
        first = taken[0][1]
        sizes |= dict(sampling=first.drawn, logprobs=first.options.logprobs)
        if self._rows is None:
            self._state, self._rows = program.start(program.params, batch, asked, rows=self.slots, **sizes)
        else:
            places = np.array(places + [self.slots] * (width - len(places)), np.int32)
            held = program.params, self._state, self._rows
            self._state, self._rows = program.refill(*held, batch, asked, places, **sizes)

    def _batch(self, requests: Sequence[Request]) -> tuple[Batch, Asked, dict[str, int]]:
        """Returns prompts and their options on the devices, and the lengths of their rows."""
        first = self._rows is None
        width = self.slots if first and len(requests) > self._together else self._together
        shared = self.program.steps.prompt_takes_room
        length = bucket(max(r.length for r in requests), self.longest) if shared else self._length
        stops = np.full((width, requests[0].kind[1]), NO_TOKEN, np.int32)
        numbers = np.zeros((3, width), np.int32)
        for row, r in enumerate(requests):
            stops[row, : len(r.stops)] = r.stops
            numbers[:, row] = np.int64(r.sampling.seed).astype(np.int32), r.index, r.limit
        arrays = self.collate([r.prompt for r in requests], width, length), Asked(*numbers, stops)
        return *self.program.place(arrays), dict(room=self._new + (self._length if shared else 1), new=self._new)

    def _advance(self, tokens: int | None) -> None:
        running = [running[1] for running in self._running if running is not None]
        most = tokens or max(r.limit for r in running)
        if any(r.options.stop_strings for r in running):
            most = min(most, CHUNK_OF_STOP_STRINGS)
        wanted, held = self._wanted_rows(), (self.program.params, self._state, self._rows)
        bounds = np.int32(most), np.int32(self.slots - wanted if wanted else 0)
        self._state, self._rows, steps = self.program.advance(*held, *bounds, sampling=running[0].drawn)
        self.decode_steps += int(fetch(steps))

    def _look(self, streaming: bool) -> list[tuple[int, Answer]]:
        """Reads the rows' tokens, and frees the rows that have ended."""
        rows = self._rows
        tokens, counts, ended = (fetch(x).copy() for x in (rows.tokens, rows.counts, rows.ended))
        logprobs = None if rows.logprobs is None else fetch(rows.logprobs)
        done, stopped = [], False
        for row, running in enumerate(self._running):
            if running is None:
                continue
            ids, (ticket, request, stream) = tokens[row, : counts[row]], running
            if streaming or request.options.stop_strings:
                piece = stream.push(_body(ids, request.stops)[len(stream.ids) :])
                self.pieces[ticket] = piece + stream.finish() if ended[row] else piece
                stopped |= stream.stopped and not ended[row]
                ended[row] |= stream.stopped
            if ended[row]:
                done.append((ticket, _answer(request, ids, stream, None if logprobs is None else logprobs[row])))
                self._running[row] = None
        if stopped:
            self._rows = rows.replace(ended=self.program.place(ended))
        return done

    def _search(
        self, taken: list[tuple[int, Request]], batch: Batch, asked: Asked, sizes: dict[str, int]
    ) -> list[tuple[int, Answer]]:
        requests = [request for _, request in taken]
        options, penalty = requests[0].options, requests[0].sampling.repetition_penalty
        rule = Rule(np.float32(options.length_penalty), np.asarray(options.early_stopping))
        sizes |= dict(beams=options.num_beams, num_stops=max(len(r.stops) for r in requests))
        prompts = self.program.params, batch, asked.limits, asked.stops
        found = self.program.search(*prompts, rule, **sizes, repetition_penalty=penalty)
        tokens, lengths, _ = (fetch(x) for x in found)
        answers = (_answer(r, tokens[row, : lengths[row]]) for row, r in enumerate(requests))
        return [(ticket, answer) for (ticket, _), answer in zip(taken, answers, strict=True)]


def or_raise(outcome: Answer | Exception) -> Answer:
    """Returns an answer of `Engine.step`, or raises the error in its place."""
    if isinstance(outcome, Exception):
        raise outcome
    return outcome


def _body(ids: np.ndarray, stops: tuple[int, ...]) -> np.ndarray:
    """Returns the tokens of an answer without its end token."""
    return ids[:-1] if len(ids) and ids[-1] in stops else ids


def _answer(
    request: Request,
    ids: np.ndarray,
    stream: TextStream | None = None,
    logprobs: np.ndarray | None = None,
) -> Answer:
    body, stopped = _body(ids, request.stops), stream is not None and stream.stopped
    kept = tuple(stream.ids if stopped else body.tolist())
    return Answer(
        text=stream.text if stopped else request.decode(kept),
        tokens=kept,
        reason="stop" if stopped or len(body) < len(ids) else "length",
        stop_token=int(ids[-1]) if len(body) < len(ids) and not stopped else None,
        logprobs=None if logprobs is None else tuple(logprobs[: len(kept)].tolist()),
    )
