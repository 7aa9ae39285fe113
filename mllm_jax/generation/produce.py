"""Media in answers: the LLM writes signal tokens, an output projector makes conditions of them, a generator media.

An answer is written in pieces. Where the LLM writes a signal token (or the begin token of queries), the piece ends, the
whole run of tokens of that medium is put in, and the next piece goes on after it. The hidden states of all runs are
computed once the answers are complete, or for a stream after each run.
"""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from functools import cached_property
from itertools import islice
from operator import itemgetter
from typing import TYPE_CHECKING, Any, Literal

import jax
import numpy as np

from mllm_jax.data.message import Conversation, conversation
from mllm_jax.data.processing.media import Encoded
from mllm_jax.data.processing.signals import SignalTokens
from mllm_jax.errors import ConfigError, DataError
from mllm_jax.generation.decode_step import on_mesh
from mllm_jax.generation.draw import LARGEST_SEED, Drawer, Drawing
from mllm_jax.generation.draw_sound import SoundDrawer
from mllm_jax.generation.draw_video import VideoDrawer
from mllm_jax.generation.media import Media
from mllm_jax.generation.options import Answer, Options
from mllm_jax.generation.program import bucket
from mllm_jax.generation.rows import rows_for
from mllm_jax.generation.sampling import Sampling
from mllm_jax.generation.warn import warn_user
from mllm_jax.sharding.hosts import fetch

if TYPE_CHECKING:
    from mllm_jax.generation.assistant import Assistant

INCOMPLETE = "incomplete"  # the reason of an answer with an incomplete run
APART = 1 << 20  # pieces of an answer draw different random numbers
DRAWERS: Mapping[str, type[Drawer]] = {"image": Drawer, "video": VideoDrawer, "audio": SoundDrawer}
NO_DRAWING = ("start_image", "strength", "latents", "noise", "count", "seed")


@dataclass(frozen=True)
class Producing:
    """The options of media in answers.

    Attributes:
        produce: modalities, such as "image", with a medium of each of which every answer begins.
        incomplete: "repair": after the first signal token of a medium, the others are put in whatever the LLM would
            write. "report": the LLM writes them itself; a run that lacks one ends the answer, with a warning and the
            reason "incomplete". Queries are always put in.
        drawing: options of `Assistant.draw` for the media, such as steps, guidance_scale, negative, height.
        most: media of an answer; the next signal token ends it, with the reason "length".
    """

    produce: tuple[str, ...] = ()
    incomplete: Literal["repair", "report"] = "repair"
    drawing: Mapping[str, Any] = field(default_factory=dict)
    most: int = 4

    def __post_init__(self):
        produce = (self.produce,) if isinstance(self.produce, str) else tuple(self.produce)
        object.__setattr__(self, "produce", produce)
        if self.incomplete not in ("repair", "report"):
            raise ConfigError(f"incomplete={self.incomplete!r}", "'repair' or 'report'", "change it")
        if self.most < max(1, len(produce)):
            raise ConfigError(f"most={self.most} media", "at least 1, and one for each of `produce`", "raise it")
        known = {each.name for each in fields(Drawing)} - set(NO_DRAWING)
        if others := sorted(set(self.drawing) - known):
            raise ConfigError(
                f"drawing with {', '.join(others)} inside an answer",
                f"some of {', '.join(sorted(known))}; the seed is that of the answer",
                "correct or drop them",
            )
        self.how()

    def how(self) -> Drawing:
        """Returns the options of drawing. Raises ConfigError: the value of one is refused."""
        return Drawing(**self.drawing)


@dataclass
class Draft:
    """An answer in progress.

    Attributes:
        prompt: what it answers.
        index: its position in the list.
        tokens: those of the answer so far, with all tokens of media.
        texts: its texts before, between and after media.
        runs: for each medium its modality and the position in `tokens` of its first signal.
        written: number of tokens that the LLM has written itself.
        reason: see `Answer`; None: the answer goes on.
        rest: signal tokens that the LLM must write next.
        conditions: float32[L, E] of each run, or a tuple of these, once they are computed.
    """

    prompt: Encoded
    index: int
    tokens: list[int] = field(default_factory=list)
    texts: list[str] = field(default_factory=lambda: [""])
    runs: list[tuple[str, int]] = field(default_factory=list)
    written: int = 0
    reason: str | None = None
    rest: tuple[str, tuple[int, ...]] | None = None
    conditions: list[Any] = field(default_factory=list)

    @property
    def read(self) -> Encoded:
        """The prompt with the answer so far."""
        weights = np.zeros(len(self.prompt.tokens) + len(self.tokens), np.float32)
        return replace(self.prompt, row=self.prompt.row.followed_by(self.tokens), loss_weights=weights)

    def text(self) -> str:
        """Returns the text with a mark for each medium, such as "<image 1>"; media of a modality count up."""
        counts: dict[str, int] = {}
        pieces = [self.texts[0]]
        for (modality, _), text in zip(self.runs, self.texts[1:], strict=True):
            counts[modality] = counts.get(modality, 0) + 1
            pieces += [f"<{modality} {counts[modality]}>", text]
        return joined(pieces)


def joined(pieces: Iterable[str]) -> str:
    """Joins texts and marks, with a space where there is none."""
    text = ""
    for piece in filter(None, pieces):
        apart = text and not text[-1].isspace() and not piece[0].isspace() and piece[0] not in ".,;:!?)"
        text += " " * bool(apart) + piece
    return text


class Producer:
    """Writes answers with media.

    Args:
        assistant: of a model with output branches.
    """

    def __init__(self, assistant: Assistant):
        self.assistant = assistant
        self.signals: dict[str, SignalTokens] = assistant.processor.layout.produced
        # Each token that begins or continues a medium, with its modality.
        self.starts = {i: m for m, each in self.signals.items() for i in each.ids[: len(each.ids) - each.markers]}

    def of(self, assistant: Assistant) -> Producer:
        """Returns the same for an assistant with other parameters; both share the compiled functions."""
        other = copy.copy(self)
        other.assistant = assistant
        other.drawers = {m: each.with_params(assistant.params[f"generator_{m}"]) for m, each in self.drawers.items()}
        return other

    def answers(
        self,
        prompts: Sequence[Encoded],
        options: Options,
        sampling: Sampling,
        how: Producing,
        *,
        batch_size: int,
        first: int = 0,
    ) -> list[Answer]:
        """Returns the answers to prompts, in their order, with their media.

        Args:
            first: the position of the first prompt in the caller's list.
        """
        self.check(options, sampling, how)
        drafts = [self._begin(prompt, i, options, how) for i, prompt in enumerate(prompts, first)]
        while going := [draft for draft in drafts if draft.reason is None]:
            asked = [(draft, self._asked(draft, options, sampling)) for draft in going]
            asked.sort(key=lambda pair: pair[1].likeness)
            engine = self.assistant.engine(rows_for(len(asked), batch_size))
            for (draft, _), answer in zip(asked, engine.answer([request for _, request in asked]), strict=True):
                self._add(draft, answer, options, how)
        media = self._media([(draft, n) for draft in drafts for n in range(len(draft.runs))], sampling, how, batch_size)
        return [self._answer(draft, [next(media) for _ in draft.runs]) for draft in drafts]

    def each(
        self,
        conversations: Iterator[Conversation],
        options: Options,
        sampling: Sampling,
        how: Producing,
        *,
        batch_size: int,
    ) -> Iterator[Answer]:
        """Yields the answers to conversations as they come, `batch_size` at a time."""
        first = 0
        while several := list(islice(conversations, batch_size)):
            prompts = [self.assistant.prompt(conversation(each)) for each in several]
            yield from self.answers(prompts, options, sampling, how, batch_size=batch_size, first=first)
            first += len(several)

    def stream(
        self, prompt: Encoded, options: Options, sampling: Sampling, how: Producing
    ) -> Generator[str | Media, None, Answer]:
        """Yields an answer's texts in pieces and each medium at its place; returns the answer."""
        self.check(options, sampling, how)
        draft, media = self._begin(prompt, 0, options, how), []

        def new():
            given = [(draft, n) for n in range(len(media), len(draft.runs))]
            for medium in self._media(given, sampling, how, 1):
                media.append(medium)
                yield medium

        yield from new()
        while draft.reason is None:
            engine = self.assistant.engine(1)
            engine.submit(self._asked(draft, options, sampling))
            answer = yield from self.assistant.streamed(engine)
            self._add(draft, answer, options, how)
            yield from new()
        return self._answer(draft, media)

    def check(self, options: Options, sampling: Sampling, how: Producing) -> None:
        """Raises ConfigError: options contradict one another, or the model does not produce a modality."""
        options.check(sampling)
        for modality in how.produce:
            self.assistant.processor.config.output(modality)
        if options.logprobs:
            raise ConfigError(
                "logprobs of answers with media", "answers without: signal tokens are put in", "use `score`"
            )

    # ---- pieces

    def _begin(self, prompt: Encoded, index: int, options: Options, how: Producing) -> Draft:
        draft = Draft(prompt, index)
        for modality in how.produce:
            if not self._place(draft, modality, options):
                signals = self.signals[modality].ids
                raise DataError(
                    f"a prompt of {len(prompt.tokens)} tokens before {len(signals)} of the {modality} to produce",
                    f"at most {self.assistant.max_length} tokens in all",
                    "shorten the prompt",
                )
        return draft

    def _asked(self, draft: Draft, options: Options, sampling: Sampling) -> Any:
        """Makes the request for the next piece."""
        if draft.rest is not None:
            options = replace(options, max_new_tokens=len(draft.rest[1]), stop_strings=())
        else:
            own = options.stop_tokens + tuple(self.starts)
            options = replace(options, max_new_tokens=options.max_new_tokens - draft.written, stop_tokens=own)
        index = draft.index + APART * len(draft.runs) + APART // 2 * (draft.rest is not None)
        return self.assistant.asked(draft.read, index, options, sampling)

    def _add(self, draft: Draft, piece: Answer, options: Options, how: Producing) -> None:
        """Adds a piece, and the medium whose first token ended it."""
        draft.tokens += piece.tokens
        draft.written += len(piece.tokens)
        if draft.rest is not None:
            (modality, rest), draft.rest = draft.rest, None
            if piece.tokens == rest:
                del draft.tokens[-len(rest) - 1 :]
                draft.reason = None if self._place(draft, modality, options) else "length"
            else:
                self._report(draft, modality, len(piece.tokens) + 1)
            return
        draft.texts[-1] = joined([draft.texts[-1], piece.text])
        modality = self.starts.get(piece.stop_token)
        if modality is None:
            draft.reason = piece.reason
            return
        draft.written += 1
        first, *rest = self.signals[modality].ids
        own = how.incomplete == "report" and not self.signals[modality].markers
        if len(draft.runs) == how.most or draft.written >= options.max_new_tokens:
            draft.reason = "length"
        elif own and piece.stop_token == first and rest:
            draft.tokens.append(first)
            draft.rest = modality, tuple(rest)
            if not self._fits(draft, len(rest)):
                draft.rest, draft.reason = None, "length"
        elif how.incomplete == "report" and piece.stop_token != first:
            self._report(draft, modality, 0)
        elif not self._place(draft, modality, options):
            draft.reason = "length"

    def _fits(self, draft: Draft, more: int) -> bool:
        """Returns whether that many tokens and another one fit in the row."""
        longest = self.assistant.max_length
        return longest is None or len(draft.prompt.tokens) + len(draft.tokens) + more < longest

    def _place(self, draft: Draft, modality: str, options: Options) -> bool:
        """Puts the tokens of a medium into the answer; returns False if they do not fit."""
        signals = self.signals[modality]
        if not self._fits(draft, len(signals.ids)):
            return False
        draft.runs.append((modality, len(draft.tokens) + signals.markers))
        draft.tokens += signals.ids
        draft.texts.append("")
        if draft.written >= options.max_new_tokens:
            draft.reason = "length"
        return True

    def _report(self, draft: Draft, modality: str, found: int) -> None:
        count = len(self.signals[modality].ids)
        warn_user(
            f"answer {draft.index}: {found} of the {count} signal tokens of the {modality} are in their order, so it "
            "is not produced; incomplete='repair' puts the others in"
        )
        draft.reason = INCOMPLETE

    def _answer(self, draft: Draft, media: Sequence[Media]) -> Answer:
        return Answer(draft.text(), tuple(draft.tokens), reason=draft.reason, media=tuple(media))

    # ---- media

    def _media(
        self, wanted: Sequence[tuple[Draft, int]], sampling: Sampling, how: Producing, batch_size: int
    ) -> Iterable[Media]:
        """Returns an iterator of the media of runs, in their order.

        Args:
            wanted: drafts, each with the number of one of its runs.
        """
        found: list[Media | None] = [None] * len(wanted)
        drafts = list({id(draft): draft for draft, _ in wanted}.values())
        self._compute_conditions(drafts, batch_size)
        for modality in self.signals:  # in one order on all hosts
            places = [i for i, (draft, n) in enumerate(wanted) if draft.runs[n][0] == modality]
            mine = [wanted[i] for i in places]
            if not mine:
                continue
            seeds = [(sampling.seed + draft.index + APART * n) % (LARGEST_SEED + 1) for draft, n in mine]
            texts = [self.assistant.processor.decode(draft.prompt.tokens).strip() for draft, _ in mine]
            states = jax.tree.map(lambda *each: np.stack(each), *(draft.conditions[n] for draft, n in mine))
            made = self.drawers[modality].draw_conditions(states, texts, replace(self._own(modality, how), seed=seeds))
            for place, answer in zip(places, made, strict=True):
                found[place] = answer.media[0]
        return iter(found)

    def _own(self, modality: str, how: Producing) -> Drawing:
        """Returns the options of drawing without those that another modality of the model has and this one lacks."""
        refused = {name: set(drawer.refused) for name, drawer in self.drawers.items()}
        others = refused[modality] - set.intersection(*refused.values())
        return Drawing(**{name: value for name, value in how.drawing.items() if name not in others})

    def _compute_conditions(self, drafts: Sequence[Draft], batch_size: int) -> None:
        """Sets the conditions of drafts, from the hidden states of whole answers."""
        program = self.assistant.program
        for chunk, batch in self.assistant.batches([draft.read for draft in drafts], batch_size):
            for modality, signals in self.signals.items():
                starts = [self._starts(drafts[i], modality) for i in chunk]
                if most := max(map(len, starts)):
                    size = len(batch["tokens"]), bucket(most, least=1), len(signals.ids) - 2 * signals.markers
                    at = np.full(size, -1, np.int32)
                    for row, places in enumerate(starts):
                        at[row, : len(places)] = np.asarray(places)[:, None] + np.arange(size[2])
                    batch[f"{modality}_signals"] = at
            made = jax.tree.map(fetch, self._projected(program.params, program.place(batch)))
            for row, i in enumerate(chunk):
                taken: Counter[str] = Counter()
                for modality, _ in drafts[i].runs:
                    own = jax.tree.map(itemgetter((row, taken[modality])), made[modality])
                    drafts[i].conditions.append(own)
                    taken[modality] += 1

    @staticmethod
    def _starts(draft: Draft, modality: str) -> list[int]:
        """Returns the positions in the row of the first signals of a modality's media."""
        return [len(draft.prompt.tokens) + start for kind, start in draft.runs if kind == modality]

    @cached_property
    def _projected(self) -> Callable:
        """Compiled: (params, batch) -> conditions [B, M, L, E] by modality."""
        steps, mesh = self.assistant.program.steps, self.assistant.mesh

        def projected(params, batch):
            with on_mesh(mesh):
                return steps.apply(params, batch, method="conditions")

        return jax.jit(projected)

    @cached_property
    def drawers(self) -> dict[str, Drawer]:
        """The generators by modality, which also draw what their own text encoders read."""
        ours, found = self.assistant, {}
        for modality, signals in self.signals.items():
            part = ours.processor.config.parts[f"generator_{modality}"]
            params = None if ours.params is None else ours.params[f"generator_{modality}"]
            found[modality] = DRAWERS[modality](part.make(), params, signals.captions, mesh=ours.mesh)
        return found
