"""A conversation in the terminal: `mllm chat MODEL`."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from rich.console import Console

from mllm_jax.data.chat import Message
from mllm_jax.errors import DataError
from mllm_jax.inference.language import LanguageGenerator
from mllm_jax.inference.options import Completion, Options
from mllm_jax.inference.sampling import Sampling

HELP = "/reset forgets the conversation, /exit leaves; Ctrl-C stops an answer"
PROMPT = "> "


class Conversation:
    """What was said, as much of it as the model can read.

    Args:
        system: the system message, which is never dropped.

    Attributes:
        turns: questions and answers in turn.
        dropped: how many pairs of them were dropped for the last question.
        completion: the last answer, None where it was stopped.
    """

    def __init__(self, generator: LanguageGenerator, options: Options, sampling: Sampling, system: str = ""):
        self.generator, self.options, self.sampling = generator, options, sampling
        self._system: list[Message] = [{"role": "system", "content": system}] if system else []
        self.turns: list[Message] = []
        self.dropped = 0
        self.completion: Completion | None = None

    def reset(self) -> None:
        self.turns = []

    def ask(self, question: str) -> Iterator[str]:
        """The answer's text in pieces; closing the iterator ends the answer, and what was said until then stays said.

        Raises:
            DataError: the question does not fit even alone; it is forgotten.
        """
        turns = [*self.turns, {"role": "user", "content": question}]
        self.dropped = 0
        while not self._fits(turns):
            turns, self.dropped = turns[2:], self.dropped + 1
        return self._answer(turns)

    def _answer(self, turns: list[Message]) -> Iterator[str]:
        said, self.completion = "", None
        stream = self.generator.stream(self._system + turns, self.options, self.sampling)
        try:
            while True:
                piece = next(stream)
                said += piece
                yield piece
        except StopIteration as end:
            self.completion, said = end.value, end.value.text
        finally:
            # A question without an answer would be followed by another one, which no template knows.
            self.turns = [*turns, {"role": "assistant", "content": said}] if said else turns[:-1]

    def _fits(self, turns: list[Message]) -> bool:
        """Whether these turns leave room for a whole answer. One alone is taken with what room it leaves."""
        length = len(self.generator.encode(self._system + turns))
        if len(turns) == 1:
            return self.generator.room(length, self.options) > 0
        limit = self.generator.max_length
        return limit is None or length + self.options.max_new_tokens <= limit


def chat(
    conversation: Conversation,
    *,
    read: Callable[[str], str] = input,
    console: Console | None = None,
) -> int:
    """Reads questions and prints answers until /exit or the end of the input; gives the exit status.

    Args:
        read: prompt -> a line; raises EOFError at the end, KeyboardInterrupt at Ctrl-C.
    """
    console = console or Console()
    console.print(HELP, style="dim")
    while True:
        try:
            line = read(PROMPT).strip()
        except EOFError:
            console.print()
            return 0
        except KeyboardInterrupt:
            console.print(f"\n{HELP}", style="dim")
            continue
        if line == "/exit":
            return 0
        if line == "/reset":
            conversation.reset()
            console.print("the conversation begins anew", style="dim")
        elif line.startswith("/"):
            console.print(HELP, style="dim")
        elif line:
            _answer(conversation, line, console)


def _answer(conversation: Conversation, question: str, console: Console) -> None:
    def show(text: str, **style) -> None:
        console.print(text, markup=False, emoji=False, highlight=False, soft_wrap=True, **style)

    try:
        pieces = conversation.ask(question)
    except DataError as error:
        return show(f"{error}", style="red")
    if conversation.dropped:
        show(f"[the oldest {conversation.dropped} turn(s) no longer fit and are forgotten]", style="dim")
    try:
        for piece in pieces:
            show(piece, end="")
    except KeyboardInterrupt:
        pieces.close()
    show("")
    if conversation.completion is None:
        show("[stopped]", style="dim")
    elif conversation.completion.finish == "length":
        show("[cut off; --max-new-tokens allows more]", style="dim")
