"""A conversation in the terminal: `mllm chat MODEL`."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from rich.console import Console

from mllm_jax.data.audio import RATE, as_audio
from mllm_jax.data.images import read_image
from mllm_jax.data.message import MEDIA, Audio, Image, Message, Part, Text, Video
from mllm_jax.data.video import read_video
from mllm_jax.errors import DataError
from mllm_jax.generation.assistant import Assistant
from mllm_jax.generation.media import Media
from mllm_jax.generation.options import Answer, Options
from mllm_jax.generation.produce import Producing
from mllm_jax.generation.sampling import Sampling

HELP = (
    "/image FILE shows an image, /video FILE a video, /audio FILE plays a sound, /reset forgets the conversation, "
    "/exit leaves; Ctrl-C stops an answer"
)
PROMPT = "> "


class Dialogue:
    """The turns of a conversation, as many as the model can read.

    Args:
        system: the system message, which is never dropped.
        producing: for a model that produces media.

    Attributes:
        turns: questions and answers in turn.
        dropped: the number of pairs that were dropped for the last question.
        answer: the last one; None if it was stopped.
    """

    def __init__(
        self,
        assistant: Assistant,
        options: Options,
        sampling: Sampling,
        system: str = "",
        producing: Producing | None = None,
    ):
        self.assistant, self.options, self.sampling, self.producing = assistant, options, sampling, producing
        self._system = (Message("system", system),) if system else ()
        self.turns: tuple[Message, ...] = ()
        self._media: tuple[Part, ...] = ()
        self.dropped = 0
        self.answer: Answer | None = None

    def reset(self) -> None:
        self.turns, self._media = (), ()

    def show(self, path: str, kind: str = "image") -> None:
        """Puts an image, a video or a sound before the next question; decodes it once.

        Raises:
            DataError: it cannot be read, or the model reads no such media.
        """
        processor, file = self.assistant.processor, Path(path).expanduser()
        processor.encoder.kind_of(MEDIA[kind]())
        if kind == "image":
            medium: Part = Image(read_image(file))
        elif kind == "audio":
            medium = Audio(as_audio(file), rate=RATE)
        else:
            frames, times = read_video(file, processor.layout.sampling)
            medium = Video(frames, times=times.seconds, fps=times.fps)
        self._media = (*self._media, medium)

    def ask(self, question: str) -> Iterator[str | Media]:
        """Yields the answer's text in pieces, and media that the model produces at their places.

        Closing the iterator ends the answer; its text so far stays in `turns`.

        Raises:
            DataError: the question with its media does not fit even alone; they are dropped.
        """
        turns = (*self.turns, Message("user", (*self._media, Text(question)) if self._media else question))
        self._media, self.dropped = (), 0
        while not self._fits(turns):
            turns, self.dropped = turns[2:], self.dropped + 1
        return self._answer(turns)

    def _answer(self, turns: tuple[Message, ...]) -> Iterator[str | Media]:
        said: list[str | Media] = []
        self.answer = None
        how = vars(self.options) | vars(self.sampling) | ({} if self.producing is None else vars(self.producing))
        stream = self.assistant.stream(self._system + turns, **how)
        try:
            while True:
                piece = next(stream)
                said.append(piece)
                yield piece
        except StopIteration as end:
            self.answer = end.value
            said = said if end.value.media else [end.value.text]
        finally:
            # Without an answer two questions would follow each other, which no template allows.
            self.turns = (*turns, Message("assistant", _content(said))) if any(said) else turns[:-1]

    def _fits(self, turns: tuple[Message, ...]) -> bool:
        """Returns whether these turns leave room for a whole answer. A single turn needs room for one token only."""
        length = len(self.assistant.prompt(self._system + turns).tokens)
        if len(turns) == 1:
            return self.assistant.room(length, self.options) > 0
        limit = self.assistant.max_length
        return limit is None or length + self.options.max_new_tokens <= limit


def _content(said: Sequence[str | Media]) -> str | tuple[Part, ...]:
    """Returns an answer as the content of a message."""
    if all(isinstance(piece, str) for piece in said):
        return "".join(said)
    parts: list[Part] = []
    for piece in filter(None, said):
        if not isinstance(piece, str):
            parts.append(piece.part())
        elif parts and isinstance(parts[-1], Text):
            parts[-1] = Text(parts[-1].text + piece)
        else:
            parts.append(Text(piece))
    return tuple(parts)


def chat(
    dialogue: Dialogue,
    *,
    save: Callable[[Media, str], Path] | None = None,
    read: Callable[[str], str] = input,
    console: Console | None = None,
    interactive: bool = True,
) -> int:
    """Reads questions and prints answers until /exit or the end of the input. Returns the exit status.

    Args:
        read: prompt -> a line; raises EOFError at the end, KeyboardInterrupt at Ctrl-C.
        save: writes a medium of an answer to a question; returns its path.
        interactive: a person types; if False, the output has no prompts and no hints.
    """
    console = console or Console()

    def hint(text: str) -> None:
        if interactive:
            console.print(text, style="dim")

    hint(HELP)
    while True:
        try:
            line = read(PROMPT if interactive else "").strip()
        except EOFError:
            hint("")
            return 0
        except KeyboardInterrupt:
            if not interactive:
                raise
            console.print(f"\n{HELP}", style="dim")
            continue
        if line == "/exit":
            return 0
        if line == "/reset":
            dialogue.reset()
            hint("the conversation begins anew")
        elif line.startswith(("/image ", "/video ", "/audio ")):
            command, path = line.split(maxsplit=1)
            if _show(dialogue, path, command[1:], console):
                hint("shown with your next question")
        elif line.startswith("/"):
            console.print(HELP, style="dim")
        elif line:
            _answer(dialogue, line, console, save)


def _show(dialogue: Dialogue, path: str, kind: str, console: Console) -> bool:
    """Returns whether the medium is shown; if not, prints the error."""
    try:
        dialogue.show(path, kind)
    except DataError as error:
        console.print(f"{error}", style="red", markup=False, emoji=False, highlight=False, soft_wrap=True)
        return False
    return True


def _answer(dialogue: Dialogue, question: str, console: Console, save: Callable[[Media, str], Path] | None) -> None:
    def show(text: str, **style) -> None:
        console.print(text, markup=False, emoji=False, highlight=False, soft_wrap=True, **style)

    try:
        pieces = dialogue.ask(question)
    except DataError as error:
        return show(f"{error}", style="red")
    if dialogue.dropped:
        show(f"[the oldest {dialogue.dropped} turn(s) no longer fit and are forgotten]", style="dim")
    try:
        for piece in pieces:
            show(piece if isinstance(piece, str) else f" {save(piece, question)} ", end="")
    except KeyboardInterrupt:
        pieces.close()
    show("")
    if dialogue.answer is None:
        show("[stopped]", style="dim")
    elif dialogue.answer.reason == "length":
        show("[cut off; --max-new-tokens allows more]", style="dim")
