"""How a conversation is written in tokens: with special tokens of our own, or as a chat model's template has it."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mllm_jax.data.chat import ChatTokenizer
from mllm_jax.errors import ConfigError, DataError
from mllm_jax.files import read_json, write_atomic

Ids = tuple[int, ...]

# What stands for text while the template's own pieces are cut out; no template spells these.
_QUESTIONS, _ANSWERS = ("first7question", "second7question"), ("first7answer", "second7answer")
# Placeholders that vision-language models have for pictures, then whatever special token the template leaves unused.
_IMAGE_TOKENS = ("<image>", "<|image|>", "<|image_pad|>")


@dataclass(frozen=True)
class ChatFormat:
    """The ids around pictures, questions (Q) and answers (A) of a row:

        begin [pictures, context, after_media] first_user Q assistant A end (user Q assistant A end)*

    Attributes:
        after_media: only behind pictures or the text in their place.
        end: what ends an answer and is learnt with it, the stop token `eos` last.
        image: holds a picture's places; the embedding of this id is never read.
        picture: what one picture is in the text, words and places; empty: its places one after the other.
        template: the chat template that the ids were cut out of, empty for special tokens of our own.
    """

    begin: Ids
    after_media: Ids
    first_user: Ids
    user: Ids
    assistant: Ids
    end: Ids
    pad: int
    bos: int
    eos: int
    image: int
    template: str = ""
    picture: Ids = ()

    def pictures(self, count: int, media_tokens: int) -> tuple[Ids, list[int]]:
        """The ids of so many pictures of `media_tokens` places each, and of each id the media token, -1 for words.

        Raises:
            ConfigError: `picture` has another number of places.
        """
        one = self.picture or (self.image,) * media_tokens
        if one.count(self.image) != media_tokens:
            raise ConfigError(
                f"words for {one.count(self.image)} places of a picture, which takes {media_tokens}",
                "words before each of them",
                "change tokenizer.places, or leave it out",
            )
        ids, numbers = one * count, iter(range(media_tokens * count))
        return ids, [next(numbers) if i == self.image else -1 for i in ids]

    @classmethod
    def own(cls, pad: int, bos: int, eos: int, image: int, user: int, assistant: int) -> ChatFormat:
        """One special token for each role: <bos> pictures context (<user> Q <assistant> A <eos>)*"""
        return cls((bos,), (), (user,), (user,), (assistant,), (eos,), pad, bos, eos, image)

    @classmethod
    def of_template(cls, chat: ChatTokenizer, system: str | None = None) -> ChatFormat:
        """Cuts the ids out of the template: what it writes around two questions and answers.

        Without pictures, rows then equal what the template gives, up to what it writes behind the last answer. Pictures
        stand before the first question, a line break behind them. Each piece becomes ids by itself: a tokenizer that
        puts a space before every text (SentencePiece) may do so at the seams.

        Args:
            system: the system message; None leaves it to the template, "" is an empty one.

        Raises:
            DataError: no template, or one that depends on more than the roles; or no stop token behind an answer.
        """
        begin, first, between, second = _pieces(chat, system)
        stored = chat.backend.chat_template
        stop = next((place for place, token in enumerate(between) if token in chat.stop_ids), None)
        if stop is None:
            raise DataError(
                f"a chat template that writes {chat.backend.decode(between)!r} behind an answer",
                f"one of the model's stop tokens {chat.backend.convert_ids_to_tokens(list(chat.stop_ids))} there",
                "name that token as eos_token in the tokenizer's files, or in generation_config.json",
            )
        if first != second:
            raise DataError(
                f"a chat template that writes {chat.backend.decode(first)!r} before one answer and "
                f"{chat.backend.decode(second)!r} before another",
                "the same before every answer",
                "train with another chat model's tokenizer, or with a simpler template",
            )
        eos = between[stop]
        bos, pad = chat.backend.bos_token_id, chat.backend.pad_token_id
        return cls(
            begin=begin,
            after_media=_ids(chat, "\n"),
            first_user=(),
            user=between[stop + 1 :],
            assistant=first,
            end=between[: stop + 1],
            pad=eos if pad is None else pad,
            bos=(begin or (eos,))[0] if bos is None else bos,
            eos=eos,
            image=_image_token(chat, {*begin, *first, *between, eos, bos, pad}),
            template=stored if isinstance(stored, str) else json.dumps(stored),
        )

    def save(self, path: Path) -> None:
        """Writes the ids, and the template they came from, as JSON: a whole file or none."""
        write_atomic(path, json.dumps(dataclasses.asdict(self), indent=1) + "\n")

    @classmethod
    def load(cls, path: Path) -> ChatFormat:
        """Reads what `save` wrote. Raises DataError: not such a file."""
        try:
            stored = read_json(path, DataError)
        except OSError as error:
            raise _damaged(path, str(error)) from error
        values = {name: tuple(value) if isinstance(value, list) else value for name, value in stored.items()}
        for field in dataclasses.fields(cls):
            if not _KINDS[field.type](values.get(field.name, field.default)):
                raise _damaged(path, f"{field.name}={values.get(field.name)!r:.100}")
        if unknown := values.keys() - {field.name for field in dataclasses.fields(cls)}:
            raise _damaged(path, f"{sorted(unknown)!r:.100}, which nothing reads")
        return cls(**values)


def _is_id(value: Any) -> bool:
    return type(value) is int and value >= 0


_KINDS = {  # by the annotations of ChatFormat
    "Ids": lambda value: isinstance(value, tuple) and all(map(_is_id, value)),
    "int": _is_id,
    "str": lambda value: isinstance(value, str),
}


def _damaged(path: Path, reason: str) -> DataError:
    return DataError(f"{path}: {reason}", "what training wrote beside tokenizer.json", "restore it")


def _ids(chat: ChatTokenizer, text: str) -> Ids:
    """Special tokens that the text spells are such tokens: it is a template's, not a user's."""
    return tuple(chat.backend(text, add_special_tokens=False)["input_ids"])


def _pieces(chat: ChatTokenizer, system: str | None) -> tuple[Ids, Ids, Ids, Ids]:
    """What the template writes before each of Q A Q A."""
    messages = [] if system is None else [{"role": "system", "content": system}]
    asked = [*messages, {"role": "user", "content": _QUESTIONS[0]}]
    for question, answer in zip(_QUESTIONS, _ANSWERS, strict=True):
        messages += [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    text = chat.render_chat(messages, add_generation_prompt=False)
    cuts = [_QUESTIONS[0], _ANSWERS[0], _QUESTIONS[1], _ANSWERS[1]]
    pieces: list[str] = []
    for cut in cuts:
        before, found, text = text.partition(cut)
        if not found or cut in text:
            raise DataError(
                f"a chat template that writes {cut!r} {'more than once' if found else 'nowhere, or out of order'}",
                "every question and answer once, in their order",
                "train with another chat model's tokenizer, or with a simpler template",
            )
        pieces.append(before)
    prompt = chat.render_chat(asked)
    if prompt != pieces[0] + _QUESTIONS[0] + pieces[1]:
        raise DataError(
            f"a chat template that asks for an answer with {prompt.partition(_QUESTIONS[0])[2]!r} and writes "
            f"{pieces[1]!r} before one that is there",
            "the same before every answer",
            "train with another chat model's tokenizer, or with a simpler template",
        )
    begin, first, between, second = (_ids(chat, piece) for piece in pieces)
    return begin, first, between, second


def _image_token(chat: ChatTokenizer, taken: set) -> int:
    """An id that nothing else in a row has, if there is one: it then shows where pictures stand."""
    special = {token.content: i for i, token in chat.backend.added_tokens_decoder.items() if token.special}
    named = [special[name] for name in _IMAGE_TOKENS if name in special]
    free = [i for _, i in sorted(special.items(), key=lambda item: item[1]) if i not in taken]
    return next(iter(named + free), chat.stop_ids[0])
