"""Conversations to token rows: which ids stand where, and which of them are learnt."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from mllm_jax.data.examples import Conversation
from mllm_jax.data.tokenizer import Tokenizer
from mllm_jax.errors import DataError


@dataclass(frozen=True)
class Encoded:
    """One example: tokens int32[n], loss_weights float32[n], media_index int32[n] (-1 is text), num_images.

    `segments` int32[n] from 1 parts it further; None is one segment.
    """

    tokens: np.ndarray
    loss_weights: np.ndarray
    media_index: np.ndarray
    num_images: int
    dropped_turns: int = 0
    segments: np.ndarray | None = None

    @property
    def length(self) -> int:
        """Places of a row that it takes."""
        return len(self.tokens)

    @property
    def slots(self) -> int:
        """Slots that its pictures take in a row."""
        return self.num_images

    @property
    def places(self) -> tuple[np.ndarray, np.ndarray]:
        """Segment of each token, from 1, and its position within it."""
        n = len(self.tokens)
        if self.segments is None:
            return np.ones(n, np.int32), np.arange(n, dtype=np.int32)
        starts = np.searchsorted(self.segments, self.segments)
        return self.segments, np.arange(n, dtype=np.int32) - starts.astype(np.int32)


def encode_conversation(
    conversation: Conversation, tokenizer: Tokenizer, media_tokens: int, max_length: int, learn: str = "answers"
) -> Encoded:
    """Lays out <bos> picture* context (<user> question <assistant> answer <eos>)*, or as `ChatFormat` says.

    A picture is `media_tokens` places. What does not fit into `max_length` is shortened by whole turns from the end;
    pictures are never cut.

    Args:
        learn: what carries loss: "answers", with what ends them, or "all" the text, as in pretraining.

    Raises:
        DataError: an empty answer, no turn at all, or a first turn that does not fit.
    """
    if not conversation.turns:
        raise DataError("a conversation without turns", "at least one question and answer", "drop or mend the record")
    if conversation.plain or not conversation.pictures_first:
        raise DataError(
            "a conversation with pictures inside its text, or without a template",
            "pictures before the first question, in rows that a run lays out itself",
            "train a named model on it, such as LLaVA, or move its pictures",
        )
    chat = tokenizer.chat
    ids, media = _opening(conversation.context, conversation.num_images, tokenizer, media_tokens)
    weights = [0.0] * len(ids)
    if learn == "all":
        weights[len(media) :] = [1.0] * (len(ids) - len(media))
    kept = 0
    for turn in conversation.turns:
        answer = tokenizer.encode(turn.answer) if turn.answer.strip() else ()
        if not answer:
            raise DataError(f"an empty answer to {turn.question!r}", "an answer with text", "drop or mend the record")
        asked = (*(chat.user if kept else chat.first_user), *tokenizer.encode(turn.question), *chat.assistant)
        answer += chat.end
        if len(ids) + len(asked) + len(answer) > max_length:
            break
        ids += (*asked, *answer)
        weights += [float(learn == "all")] * len(asked) + [1.0] * len(answer)
        kept += 1
    if kept == 0:
        need = len(ids) + len(asked) + len(answer)
        raise DataError(
            f"an example of {need} tokens with {conversation.num_images} picture(s) of {media_tokens}",
            f"at most {max_length} tokens with its first turn",
            "raise the row's length, or lower the media tokens a picture takes",
        )
    media += [-1] * (len(ids) - len(media))
    return Encoded(
        np.asarray(ids, np.int32),
        np.asarray(weights, np.float32),
        np.asarray(media, np.int32),
        conversation.num_images,
        len(conversation.turns) - kept,
    )


def caption_ids(text: str, tokenizer: Tokenizer) -> tuple[int, ...]:
    """<bos> caption <eos>"""
    return (tokenizer.bos, *tokenizer.encode(text), tokenizer.eos)


def encode_captions(
    conversation: Conversation, tokenizer: Tokenizer, media_tokens: int, max_length: int, most: int = 1
) -> Encoded:
    """Lays out (<bos> caption <eos>)* for a text tower; the picture stands beside the texts, not in them.

    `segments` counts the captions from 1; `media_index` is the place that a caption describes, -1 the whole picture.

    Raises:
        DataError: an empty caption, more captions than `most` or `max_length` allow, or a place that no picture has.
    """
    if not 0 < len(conversation.turns) <= most:
        raise DataError(
            f"a picture with {len(conversation.turns)} captions", f"1 to {most}", "raise the mixture's captions"
        )
    ids: list[int] = []
    segments: list[int] = []
    media: list[int] = []
    for number, turn in enumerate(conversation.turns, start=1):
        text = caption_ids(turn.answer, tokenizer)
        if not turn.answer.strip():
            raise DataError("an empty caption", "a caption with text", "drop or mend the record")
        if turn.place is not None and not 0 <= turn.place < media_tokens:
            raise DataError(
                f"a caption of place {turn.place}: {turn.answer[:60]!r}",
                f"one of the {media_tokens} that the encoder makes of a picture",
                "give the encoder as many regions as the pictures have",
            )
        ids += text
        segments += [number] * len(text)
        media += [-1 if turn.place is None else turn.place] * len(text)
    if len(ids) > max_length:
        first = conversation.turns[0].answer
        raise DataError(
            f"{number} caption(s) of {len(ids)} tokens: {first[:60]!r}",
            f"at most {max_length} tokens",
            "raise the row's length",
        )
    return Encoded(
        np.asarray(ids, np.int32),
        np.ones(len(ids), np.float32),
        np.asarray(media, np.int32),
        conversation.num_images,
        segments=np.asarray(segments, np.int32),
    )


def encode_prompt(
    question: str, num_images: int, tokenizer: Tokenizer, media_tokens: int, context: str = ""
) -> Encoded:
    """The row of a question that waits for its answer: everything up to and including <assistant>."""
    ids, media = _opening(context, num_images, tokenizer, media_tokens)
    ids += (*tokenizer.chat.first_user, *tokenizer.encode(question), *tokenizer.chat.assistant)
    media += [-1] * (len(ids) - len(media))
    n = len(ids)
    return Encoded(np.asarray(ids, np.int32), np.zeros(n, np.float32), np.asarray(media, np.int32), num_images)


def _opening(context: str, num_images: int, tokenizer: Tokenizer, media_tokens: int) -> tuple[list[int], list[int]]:
    """The ids before the first question, and the media index of those that are no text to be learnt."""
    chat = tokenizer.chat
    pictures, places = chat.pictures(num_images, media_tokens)
    ids, media = [*chat.begin, *pictures], [-1] * len(chat.begin) + places
    if context:
        ids += tokenizer.encode(context)
    if context or pictures:
        ids += chat.after_media
    return ids, media
