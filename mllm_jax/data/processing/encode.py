"""Encoding of examples as rows: applies chat templates, and marks the tokens that carry loss."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from functools import cached_property
from itertools import groupby
from typing import Any, Protocol

import numpy as np

from mllm_jax.data.chat_template import parted
from mllm_jax.data.message import Example, Message, Part, Text
from mllm_jax.data.processing.layouts import Layout
from mllm_jax.data.processing.media import TEXT, Encoded, PreparedMedia, Row, each_placed, lay_out_row, one_of
from mllm_jax.data.units import in_words
from mllm_jax.errors import ConfigError, DataError


class Words(Protocol):
    """The interface of `ChatTokenizer` and of a `Tokenizer` that was trained here.

    Attributes:
        answer_id: the id that the chat template writes before each answer and at no other position, if the text of a
            message is known not to depend on later ones; None: unknown, so each answer's beginning is searched.
    """

    has_template: bool
    answer_id: int | None
    stop_ids: tuple[int, ...]
    pad_token_id: int | None
    special_tokens: Sequence[str]

    def encode(self, text: str) -> list[int]: ...
    def ids(self, text: str) -> list[int]: ...
    def render_chat(self, messages: Sequence[dict], add_generation_prompt: bool = True) -> str: ...
    def decode(self, ids: Sequence[int]) -> str: ...
    def token_of(self, token_id: int) -> str: ...
    def fingerprint(self) -> str: ...


class ExampleEncoder:
    """Lays messages out with a model's chat template and layout.

    Args:
        system: the system message of conversations without one; None leaves it to the template.
    """

    def __init__(self, tokenizer: Words, layout: Layout, system: str | None = None):
        self.tokenizer, self.layout, self.system = tokenizer, layout, system
        self.placeholders = tuple(layout.placeholders.values())
        self._marks = {kind: tokenizer.token_of(token) for kind, token in layout.placeholders.items()}
        # The mark of a type in the template's input.
        self._written = {"image": next(iter(self._marks.values()))} if layout.one_placeholder else self._marks

    # ---- text

    def ids_of(self, messages: Sequence[Message], add_generation_prompt: bool = True) -> list[int]:
        """Encodes a conversation as ids with a placeholder for each medium.

        Raises:
            DataError: a message spells a placeholder or has media that the model lacks, or the chat template refuses
                it.
        """
        return self.ids_of_shown(self.shown(self.with_system(messages)), add_generation_prompt)

    def with_system(self, messages: Sequence[Message]) -> Sequence[Message]:
        """Adds the system message, if there is one and the messages have none."""
        if self.system is None or (messages and messages[0].role == "system"):
            return messages
        return (Message("system", self.system), *messages)

    def shown(self, messages: Sequence[Message]) -> list[dict[str, Any]]:
        """Returns the template's input for messages; raises the same as `ids_of`."""
        return [{"role": message.role, "content": self._content(message)} for message in messages]

    def ids_of_shown(self, shown: Sequence[dict[str, Any]], add_generation_prompt: bool = True) -> list[int]:
        """Returns the ids of the template's output."""
        return self.layout.without_names(self.tokenizer.ids(self.tokenizer.render_chat(shown, add_generation_prompt)))

    def _content(self, message: Message) -> Any:
        """Returns the template's input for a message's content."""
        if isinstance(message.content, str) and (self.layout.flattens or self._reads_texts):
            return self._text(message.content)
        parts = [self._part(part) for part in message.parts]
        return self._flat(parts) if self.layout.flattens else parts

    @cached_property
    def _reads_texts(self) -> bool:
        """True if the template writes a content that is a str; many of models with media silently leave it out."""
        probe = [{"role": "user", "content": "wombat"}, {"role": "assistant", "content": "quokka"}]
        try:
            written = self.tokenizer.render_chat(probe, add_generation_prompt=False)
        except DataError:
            return False
        return all(message["content"] in written for message in probe)

    def _part(self, part: Part) -> dict[str, str]:
        if isinstance(part, Text):
            return {"type": "text", "text": self._text(part.text)}
        kind = self.kind_of(part)
        return {"type": "image" if self.layout.one_placeholder else kind}

    def kind_of(self, part: Part) -> str:
        """Returns the modality of a medium. Raises DataError: the model reads no such media."""
        kind = type(part).__name__.lower()
        if kind not in self._marks:
            raise DataError(
                f"a message with a part of type {kind!r}",
                f"text{''.join(f', {each}' for each in self._marks)}",
                "change the type, or take a model that reads it",
            )
        return kind

    def _flat(self, parts: Sequence[dict[str, str]]) -> str:
        """Joins parts into one text in which media are their tokens. A line break separates adjacent texts, and the
        media from an only text after them."""
        pieces: list[str] = []
        for number, part in enumerate(parts):
            is_text, before = part["type"] == "text", [each["type"] for each in parts[:number]]
            alone = number == len(parts) - 1 and "text" not in before
            if is_text and before and (alone or before[-1] == "text"):
                pieces.append("\n")
            pieces.append(part["text"] if is_text else self._written[part["type"]])
        return "".join(pieces)

    def _text(self, text: str) -> str:
        if self.layout.keeps_text:
            return parted(text, self.tokenizer.special_tokens)
        for reserved in self._marks.values():
            if reserved in text:
                raise DataError(
                    f"a message whose text has {reserved!r} in it ({text[:60]!r})",
                    "text, in which this would become a placeholder for an image",
                    'take it out, and give images as parts {"type": "image"} of the content',
                )
        return text

    def text_ids(self, message: Message) -> list[int]:
        """Encodes a message without a chat template, with a placeholder for each medium."""
        pieces = []
        for is_text, parts in groupby(message.parts, lambda part: isinstance(part, Text)):
            if is_text:  # as one: adjacent texts could spell a special token together
                pieces.append(self._text("".join(part.text for part in parts)))
            elif not self.layout.inserts_images:
                pieces += [self._marks[self.kind_of(part)] for part in parts]
        return self.tokenizer.encode("".join(pieces))

    def media_of(self, messages: Sequence[Message], learned: bool = True) -> list[PreparedMedia]:
        """Prepares the media of a conversation in order; those of answers may be media that the model produces.

        Args:
            learned: whether the model learns from the answers.
        """
        parts = [(message.role, part) for message in messages for part in message.parts if not isinstance(part, Text)]
        answered = self.layout.answered
        return self.layout.prepare([answered(part, learned) if role == "assistant" else part for role, part in parts])

    def lay_out(self, ids: Sequence[int], media: Sequence[PreparedMedia], what: str) -> Row:
        """Puts media tokens into a text at the positions of its media; `what` names it in a DataError."""
        return lay_out_row(self.layout.arrange(list(ids), len(media)), media, self.placeholders, what)

    def fingerprint(self) -> str:
        """Returns a text that differs if rows would."""
        return repr([self.tokenizer.fingerprint(), self.system, self.layout.fingerprint()])


def encode_turns(encoder: ExampleEncoder, example: Example, max_length: int, learn: str) -> Encoded:
    """Lays out questions and answers; drops whole turns at the end if they do not fit, and never cuts media.

    The template writes the whole conversation and, for each answer, the conversation before it. The tokens that an
    answer adds carry loss, so no mask depends on a template's details. Refuses a template that rewrites earlier text.

    Args:
        learn: the part that carries loss: "answers" with their end tokens, or "all" the text.

    Raises:
        DataError: there is no answer or one without text, the first turn does not fit, a text spells a placeholder, or
            the template does not write a conversation as a continuation of its beginning.
        ConfigError: the template has no end token.
    """
    require_answers(example.messages)
    messages = encoder.with_system(example.messages)
    answers = [i for i, message in enumerate(messages) if message.role == "assistant"]
    media, shown = encoder.media_of(example.messages), encoder.shown(messages)
    for kept in range(len(answers), 0, -1):
        ids = encoder.ids_of_shown(shown[: answers[kept - 1] + 1], add_generation_prompt=False)
        media = media[: sum(not isinstance(part, Text) for m in messages[: answers[kept - 1] + 1] for part in m.parts)]
        _end(
            encoder, ids, 0, len(ids)
        )  # a template without an end token may also leave out media: refuse the missing end first
        row = encoder.lay_out(ids, media, "a conversation")
        if len(row.tokens) <= max_length:
            break
    else:
        raise _too_long("an example", row, media, f"{max_length} tokens with its first turn")
    weights = np.zeros(len(ids), np.float32)
    known = encoder.tokenizer.answer_id
    if known is None:
        starts = [_start(encoder, shown[:i], ids) for i in answers[:kept]]
    else:
        starts = [place + 1 for place, token in enumerate(ids) if token == known]
    for i, start, following in zip(answers[:kept], starts, [*starts[1:], len(ids)], strict=True):
        end = _end(encoder, ids, start, following)
        weights[(1 if learn == "all" else start) : end] = 1
        if following < len(ids) and known is None:
            _require_kept(encoder, shown[: i + 1], ids, end)
    return Encoded(row, _spread(encoder, ids, row, media, weights), media, dropped_turns=len(answers) - kept)


def encode_answer(encoder: ExampleEncoder, example: Example, max_length: int, start_id: int, end_id: int) -> Encoded:
    """Lays out a question for an encoder-decoder's encoder and the answer for its decoder.

    The question of a text is its media.
    """
    *asked, answer = example.messages
    _require_words(answer)
    media = encoder.layout.prepare(example.media)
    if encoder.tokenizer.has_template and asked:
        ids = encoder.ids_of(asked)
    else:
        shown = [part for part in answer.parts if not isinstance(part, Text)]
        ids = encoder.text_ids(Message("user", (*(part for message in asked for part in message.parts), *shown)))
    row = encoder.lay_out(ids, media, "a question")
    target = np.asarray([start_id, *encoder.tokenizer.ids(answer.text), end_id])
    encoded = Encoded(row, (np.arange(len(target)) > 0).astype(np.float32), media, target=target)
    if encoded.length > max_length:
        raise _too_long("a question", row, media, f"{max_length} tokens each", f", an answer of {len(target)}")
    return encoded


def encode_text(encoder: ExampleEncoder, example: Example, max_length: int, learn: str) -> Encoded:
    """Lays out text with media and a line break, as in LLaVA's pretraining; the text after media carries loss."""
    (message,) = example.messages
    _require_words(message)
    media = encoder.layout.prepare(example.media)
    ids = encoder.text_ids(replace(message, content=(*message.parts, Text("\n"))))
    shown = [place for place, token in enumerate(ids) if token in encoder.placeholders]
    weights = np.zeros(len(ids), np.float32)
    weights[(1 if learn == "all" else max(shown, default=-1) + 1) :] = 1
    row = encoder.lay_out(ids, media, "a conversation")
    if len(row.tokens) > max_length:
        raise _too_long("a caption", row, media, f"{max_length} tokens")
    return Encoded(row, _spread(encoder, ids, row, media, weights), media)


def encode_captions(encoder: ExampleEncoder, example: Example, max_length: int, most: int, regions: int) -> Encoded:
    """Lays out (<bos> caption <eos>)* for a text encoder, a segment each; the image is not in the texts.

    Args:
        most: the most captions of an image.
        regions: number of media tokens of an image, which captions may describe.

    Raises:
        DataError: a caption is empty or of a region that no image has, or captions exceed `most` or `max_length`.
    """
    media = encoder.layout.prepare(example.media)
    captions = [(example.messages[number].text, s.region) for s in example.segments for number in s.messages]
    captions = captions or [(m.text, None) for m in example.messages if m.role == "assistant"]
    if not 0 < len(captions) <= most:
        raise DataError(f"an image with {len(captions)} captions", f"1 to {most}", "raise the mixture's captions")
    ids: list[int] = []
    segments: list[int] = []
    places: list[int] = []
    for number, (caption, region) in enumerate(captions, start=1):
        if not caption.strip():
            raise DataError("an empty caption", "a caption with text", "drop or correct the record")
        if region is not None and not 0 <= region < regions:
            raise DataError(
                f"a caption of region {region}: {caption[:60]!r}",
                f"one of the {regions} regions of an image",
                "give the encoder as many regions as the images have",
            )
        text = encoder.tokenizer.caption_ids(caption)
        ids += text
        segments += [number] * len(text)
        places += [TEXT if region is None else region] * len(text)
    if len(ids) > max_length:
        raise DataError(
            f"{number} caption(s) of {len(ids)} tokens: {captions[0][0][:60]!r}",
            f"at most {max_length} tokens",
            "raise the row's length",
        )
    index = np.asarray(places)[:, None]
    row = Row(np.asarray(ids), index, np.ones(index.shape, np.float32), np.where(index[:, 0] >= 0, 0, -1))
    return Encoded(row, np.ones(len(ids), np.float32), media, segments=np.asarray(segments, np.int32))


def require_answers(messages: Sequence[Message]) -> int:
    """Returns the number of answers. Raises DataError: none, one without text, or messages after the last."""
    answers = [i for i, message in enumerate(messages) if message.role == "assistant"]
    for i in answers:
        if not messages[i].text.strip() and all(isinstance(part, Text) for part in messages[i].parts):
            question = messages[i - 1].text if i else ""
            raise DataError(f"an empty answer to {question[:60]!r}", "an answer with text", "drop or correct it")
    if not answers or answers[-1] != len(messages) - 1:
        raise DataError(
            f"a conversation of {len(answers)} answers in {len(messages)} messages",
            "at least one question, and an answer to each",
            "drop or correct the record",
        )
    return len(answers)


def _too_long(what: str, row: Row, media: Sequence[PreparedMedia], most: str, more: str = "") -> DataError:
    kinds = Counter(medium.modality for medium in media)
    fewer = ", or give it fewer or smaller " + " and ".join(f"{kind}s" for kind in kinds) if kinds else ""
    return DataError(
        f"{what} of {len(row.tokens):,} tokens with {in_words(kinds, 'image')}{more}",
        f"at most {most}",
        f"raise the row's length{fewer}",
    )


def _require_words(message: Message) -> None:
    if not message.text.strip():
        raise DataError("a text without words", "a caption or another text", "drop or correct the record")


def _start(encoder: ExampleEncoder, before: Sequence[dict[str, Any]], ids: list[int]) -> int:
    """Returns the position at which an answer begins: after the text that the template writes to ask for it."""
    asked = encoder.ids_of_shown(before)
    if ids[: len(asked)] != asked:
        raise _rewritten()
    return len(asked)


def _require_kept(encoder: ExampleEncoder, shown: Sequence[dict[str, Any]], ids: list[int], end: int) -> None:
    """Raises DataError: the template writes an answer differently if a question follows."""
    if encoder.ids_of_shown(shown, add_generation_prompt=False)[:end] != ids[:end]:
        raise _rewritten()


def _rewritten() -> DataError:
    return DataError(
        "a chat template that writes a question differently once it has an answer",
        "a conversation that continues its beginning",
        "train with a template that only adds text",
    )


def _end(encoder: ExampleEncoder, ids: list[int], start: int, following: int) -> int:
    """Returns the position after an answer's stop token; the template's text after it carries no loss."""
    stops = encoder.tokenizer.stop_ids
    first = next((place for place in range(start, following) if ids[place] in stops), None)
    if first is None:
        # Not a DataError, which would count as a bad record.
        names = [encoder.tokenizer.token_of(token) for token in stops]
        raise ConfigError(
            f"a chat template that writes none of the stop tokens {names} after an answer",
            "answers with an end, so that the model learns to stop",
            "add one to the template (TokenizerConfig.template, or the folder's chat_template), or add the token "
            "that it writes to tokenizer_config.json or generation_config.json",
        )
    return first + 1


def _spread(
    encoder: ExampleEncoder, ids: Sequence[int], row: Row, media: Sequence[PreparedMedia], weights: np.ndarray
) -> np.ndarray:
    """Spreads the loss weights of a text over a row, in which media carry none, unless the model produces them."""
    placed = one_of(np.asarray(ids), encoder.placeholders)
    spread = np.zeros(len(row.tokens), np.float32)
    spread[row.owners < 0] = weights[~placed]
    # Models whose texts have no placeholders produce no media.
    for (number, medium), weight in zip(each_placed(media), weights[placed], strict=bool(placed.any())):
        if medium.carried is not None:
            spread[row.owners == number] = weight * medium.carried
    return spread
