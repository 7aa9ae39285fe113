"""Answers to a stream of conversations, many at a time, in bounded memory; a bad one fails alone."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import islice
from typing import TYPE_CHECKING

from mllm_jax.data.message import Conversation, conversation
from mllm_jax.errors import MllmError
from mllm_jax.generation.engine import Request
from mllm_jax.generation.options import Answer, Options
from mllm_jax.generation.program import bucket
from mllm_jax.generation.sampling import Sampling

if TYPE_CHECKING:
    from mllm_jax.generation.assistant import Assistant

AHEAD = 16  # conversations of a window per row
MEDIA_BYTES = 256 << 20  # of prepared media in a window, at most
HELD = 128  # conversations per row from the first unanswered one on; no window is read past them
LOOSE = 4  # rows that are this many times too long are replaced by shorter ones

Outcome = Answer | MllmError


def outcomes(
    assistant: Assistant,
    conversations: Iterable[tuple[int, Conversation | MllmError]],
    options: Options = Options(),
    sampling: Sampling = Sampling(),
    *,
    batch_size: int,
) -> Iterator[tuple[int, Outcome]]:
    """Answers conversations as they come.

    Reads a window of at most 16 * batch_size conversations at a time, fewer if their media are large, and the next
    window when all of them have rows. Media are read with their window and dropped when a row has read them.

    Args:
        conversations: each with its number, which with the seed determines a sampled answer; an error in place of
            one that could not be read.

    Yields:
        Each number with its answer, or with the error of a conversation that cannot be answered, in the given order.

    Raises:
        ConfigError: options contradict one another, or the model writes no text.
    """
    options.check(sampling)
    assistant.llm  # noqa: B018 - refuses a model that writes no text
    return _Bulk(assistant, conversations, options, sampling, batch_size).run()


class _Bulk:
    def __init__(
        self,
        assistant: Assistant,
        conversations: Iterable[tuple[int, Conversation | MllmError]],
        options: Options,
        sampling: Sampling,
        rows: int,
    ):
        self.assistant, self.options, self.sampling, self.rows = assistant, options, sampling, rows
        self.engine = assistant.engine(rows)
        self.source = iter(conversations)
        self.count = 0  # conversations that were read
        self.window: list[tuple[int, Request]] = []  # requests that were read and not submitted, by position
        self.tickets: dict[int, int] = {}  # positions of submitted requests, by ticket
        self.found: dict[int, tuple[int, Outcome]] = {}  # by position, until all earlier ones have been yielded
        self.numbers: dict[int, int] = {}

    def run(self) -> Iterator[tuple[int, Outcome]]:
        given, ended = 0, False
        while not ended or given < self.count:
            if not (ended or self.window or self.engine.waiting) and self.count - given < HELD * self.rows:
                ended = not self._read()
                self.window.sort(key=lambda read: read[1].likeness)
            if self.window and not self._loose():
                self._submit()
            for ticket, outcome in self.engine.step():
                if not isinstance(outcome, Outcome):
                    raise outcome  # not an MllmError: a bug
                self._end(self.tickets.pop(ticket), outcome)
            while given in self.found:
                yield self.found.pop(given)
                given += 1

    def _read(self) -> bool:
        """Reads a window; returns False at the end of the input."""
        before, held = self.count, 0
        for number, given in islice(self.source, AHEAD * self.rows):
            position, self.count = self.count, self.count + 1
            self.numbers[position] = number
            try:
                request = self._request(number, given)
            except MllmError as error:
                self._end(position, error)
                continue
            self.window.append((position, request))
            held += sum(array.nbytes for medium in request.prompt.media for array in medium.arrays.values())
            if held > MEDIA_BYTES:
                break
        return self.count > before

    def _request(self, number: int, given: Conversation | MllmError) -> Request:
        if isinstance(given, MllmError):
            raise given
        prompt = self.assistant.prompt(conversation(given))
        return self.assistant.asked(prompt, number, self.options, self.sampling)

    def _loose(self) -> bool:
        """Returns whether the rows in use are far too long for the window."""
        return self.engine.length >= LOOSE * bucket(max(request.length for _, request in self.window))

    def _submit(self) -> None:
        window, self.window = self.window, []
        for position, request in window:
            try:
                self.tickets[self.engine.submit(request)] = position
            except MllmError as error:
                self._end(position, error)

    def _end(self, position: int, outcome: Outcome) -> None:
        self.found[position] = self.numbers.pop(position), outcome
