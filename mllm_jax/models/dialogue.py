"""Conversations as rows to train a named model on: the ids of its own chat template, and which of them are learnt."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from mllm_jax.data.dialogues import EncodedDialogue
from mllm_jax.data.examples import Conversation
from mllm_jax.data.media import Media, Row
from mllm_jax.errors import ConfigError, DataError
from mllm_jax.models.processor import Layout, Processor


class DialogueEncoder:
    """Lays conversations out as a checkpoint's own chat template does, pictures where the questions have them.

    The template writes the whole conversation and each of its beginnings; what an answer adds to its beginning is what
    is learnt. So no mask depends on how a template looks, and one that rewrites earlier turns is refused.

    An encoder-decoder reads the question, by the template where there is one, and its decoder learns the answer. For
    it, and for a projector that reads the question too, a conversation is one question and its answer.

    Args:
        processor: of the model that is trained.
        system: a message before the conversation; None leaves it to the template.
    """

    def __init__(self, processor: Processor, system: str | None = None):
        self.processor, self.system = processor, system

    @property
    def decodes(self) -> bool:
        """Whether examples have a target beside their text."""
        return self.processor.config.encoder_decoder

    @property
    def layout(self) -> Layout:
        """How the model's pictures are prepared and collated."""
        return self.processor.layout

    def fingerprint(self) -> str:
        """A text that differs where rows would."""
        chat = self.processor.tokenizer.backend
        return repr([self.processor.config, chat.chat_template, self.system, len(chat)])

    def encode(
        self, conversation: Conversation, images: list[np.ndarray], max_length: int, learn: str = "answers"
    ) -> EncodedDialogue:
        """Lays out a conversation; what does not fit is shortened by whole turns from its end, media are never cut.

        Args:
            learn: what carries loss: "answers", with what ends them, or "all" the text.

        Raises:
            DataError: an empty answer, no turn, several where one is read, a first turn that does not fit, a text that
                spells a placeholder, or a template that does not write a conversation as a continuation of its
                beginning.
            ConfigError: a template without an end token.
        """
        if not conversation.turns or not all(turn.answer.strip() for turn in conversation.turns):
            raise DataError(
                f"a conversation of {len(conversation.turns)} turns, or an answer without text",
                "at least one question, and an answer to each",
                "drop or mend the record",
            )
        media, reads = self.layout.images(images), self.layout.instruction_length > 0
        if (self.decodes or reads) and len(conversation.turns) > 1:
            raise DataError(
                f"a conversation of {len(conversation.turns)} turns",
                "one question and its answer: an encoder-decoder, or a Q-Former that reads the question, takes no more",
                "make each question a record of its own",
            )
        if self.decodes:
            encoded = self._answered(conversation, media, max_length)
        elif conversation.plain:
            encoded = self._plain(conversation, media, max_length, learn)
        else:
            encoded = self._turns(conversation, media, max_length, learn)
        return replace(encoded, instruction=self.layout.instruction(_asked(conversation))) if reads else encoded

    def _turns(self, conversation: Conversation, media: list[Media], max_length: int, learn: str) -> EncodedDialogue:
        """Questions and answers in one text."""
        kept: tuple[Row, np.ndarray] | None = None
        messages = [] if self.system is None else [{"role": "system", "content": self.system}]
        learnt: list[tuple[int, int]] = []
        before: list[int] = []
        for number, turn in enumerate(conversation.turns):
            messages.append({"role": "user", "content": _question(conversation, number, len(media))})
            asked = self.processor.ids_of(messages)
            messages.append({"role": "assistant", "content": [{"type": "text", "text": turn.answer}]})
            said = self.processor.ids_of(messages, add_generation_prompt=False)
            if said[: len(asked)] != asked or (learnt and said[: learnt[-1][1]] != before[: learnt[-1][1]]):
                raise DataError(
                    "a chat template that writes a question otherwise once it is answered",
                    "a conversation that goes on where its beginning ended",
                    "train with a template that only adds to what it wrote",
                )
            learnt.append((0 if learn == "all" else len(asked), self._end(said)))
            before = said
            row, weights = self._laid_out(said, learnt, media)
            if len(row.tokens) > max_length:
                break
            kept = row, weights, number + 1
        if kept is None:
            raise DataError(
                f"an example of {len(row.tokens)} tokens with {len(media)} picture(s)",
                f"at most {max_length} tokens with its first turn",
                "raise the row's length, or give it fewer or smaller pictures",
            )
        row, weights, turns = kept
        return EncodedDialogue(row, weights, media, len(conversation.turns) - turns)

    def _answered(self, conversation: Conversation, media: list[Media], max_length: int) -> EncodedDialogue:
        """A question for the encoder, its answer for the decoder."""
        if self.processor.tokenizer.has_template and not conversation.plain:
            system = [] if self.system is None else [{"role": "system", "content": self.system}]
            question = {"role": "user", "content": _question(conversation, 0, len(media))}
            ids = self.processor.ids_of([*system, question])
        else:
            ids = self.processor.ids_of_text(_asked(conversation))
        row = self.processor.lay_out(ids, media, "a question")
        target = np.asarray(self.processor.target_of(conversation.turns[0].answer))
        encoded = EncodedDialogue(row, (np.arange(len(target)) > 0).astype(np.float32), media, target=target)
        if encoded.length > max_length:
            raise DataError(
                f"a question of {len(row.tokens)} tokens with {len(media)} picture(s), an answer of {len(target)}",
                f"at most {max_length} tokens each",
                "raise the row's length, or give it fewer or smaller pictures",
            )
        return encoded

    def _plain(self, conversation: Conversation, media: list[Media], max_length: int, learn: str) -> EncodedDialogue:
        """Pictures, the caption and a line break, which LLaVA's pretraining has for an end."""
        mark = self.processor.tokenizer.backend.convert_ids_to_tokens(self.layout.image_token)
        caption = conversation.turns[0].answer
        if mark in caption:
            raise DataError(f"a caption with {mark!r} in it", "text", "drop or mend the record")
        marks = "" if self.layout.places_pictures else mark * len(media)
        ids = self.processor.tokenizer.encode(f"{marks}{caption}\n")
        shown = [place for place, token in enumerate(ids) if token == self.layout.image_token]
        first = 0 if learn == "all" else max(shown, default=-1) + 1
        row, weights = self._laid_out(ids, [(first, len(ids))], media)
        if len(row.tokens) > max_length:
            raise DataError(
                f"a caption of {len(row.tokens)} tokens with {len(media)} picture(s)",
                f"at most {max_length} tokens",
                "raise the row's length, or give it fewer or smaller pictures",
            )
        return EncodedDialogue(row, weights, media)

    def _end(self, ids: list[int]) -> int:
        """One past the stop token that ends the last answer; what a template writes behind it is not learnt."""
        stops = self.processor.tokenizer.stop_ids
        last = next((place for place in range(len(ids) - 1, -1, -1) if ids[place] in stops), None)
        if last is None:
            # No fault of a record, so it is no DataError, which would be told of each.
            names = self.processor.tokenizer.backend.convert_ids_to_tokens(list(stops))
            raise ConfigError(
                f"a chat template that writes none of the stop tokens {names} after an answer",
                "answers that end, so that the model learns to",
                "add one to the template (TokenizerConfig.template, or the folder's chat_template), or name the token "
                "that it writes in tokenizer_config.json or generation_config.json",
            )
        return last + 1

    def _laid_out(self, ids: list[int], learnt: list[tuple[int, int]], media: list[Media]) -> tuple[Row, np.ndarray]:
        weights = np.zeros(len(ids), np.float32)
        for start, stop in learnt:
            weights[start:stop] = 1
        row = self.processor.lay_out(ids, media, "a conversation")
        spread = np.zeros(len(row.tokens), np.float32)
        # Placeholders carry no loss, so the weights of the text keep their order around what stands for pictures.
        spread[row.owners < 0] = weights[~np.isin(ids, self.processor.placeholders)]
        return row, spread


def _asked(conversation: Conversation) -> str:
    """The first question as plain text; of a caption none is asked."""
    opening = f"{conversation.context}\n" if conversation.context else ""
    return "" if conversation.plain else f"{opening}{conversation.turns[0].question}".strip()


def _question(conversation: Conversation, number: int, images: int) -> list[dict[str, str]]:
    """The parts of a question: its text, cut where pictures stand, and the pictures."""
    turn = conversation.turns[number]
    opening = f"{conversation.context}\n" if number == 0 and conversation.context else ""
    text, places = f"{opening}{turn.question}", [len(opening) + place for place in turn.images_at or ()]
    if number == 0 and not any(each.images_at for each in conversation.turns):
        text, places = text.strip(), [0] * images
    parts, start = [], 0
    for place in places:
        parts += [{"type": "text", "text": text[start:place]}, {"type": "image"}]
        start = place
    parts.append({"type": "text", "text": text[start:]})
    return [part for part in parts if part["type"] == "image" or part["text"]] or parts
