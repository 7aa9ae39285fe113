"""The conversion of conversations and examples to batches, for every model, in training and generation."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from mllm_jax.checkpoints.run import RunFolder, is_run
from mllm_jax.checkpoints.table import Family
from mllm_jax.data.batch import BatchSpec, assemble, instruction_spec
from mllm_jax.data.chat_tokenizer import ChatTokenizer
from mllm_jax.data.message import MEDIA, TEXT_ROLE, Conversation, Example, Message, Part, Text, conversations
from mllm_jax.data.processing.encode import (
    ExampleEncoder,
    Words,
    encode_answer,
    encode_captions,
    encode_text,
    encode_turns,
    require_answers,
)
from mllm_jax.data.processing.layouts import Layout, TextLayout
from mllm_jax.data.processing.media import Encoded, PreparedMedia
from mllm_jax.data.processing.video import with_sound
from mllm_jax.data.tokenizer import tokenizer_in
from mllm_jax.data.video import FIVE_FRAMES, FrameSampling
from mllm_jax.errors import ConfigError, DataError
from mllm_jax.llms.protocol import LLMConfig
from mllm_jax.models.companions import fitting
from mllm_jax.models.composed_layout import composed_layout
from mllm_jax.models.protocol import LanguageOnly, ModelConfig
from mllm_jax.models.reshape import with_image_size

BUCKET = 16  # instructions are padded to a multiple of this, so that several lengths share one compilation


class Processor:
    """A processor that converts texts with media to batches.

    Args:
        config: the model's.
        tokenizer: with its chat template.
        layout: the model's.
        system: a message before each conversation; None: the template decides.
    """

    def __init__(self, config: Any, tokenizer: Words, layout: Layout, system: str | None = None):
        self.config, self.tokenizer, self.layout = config, tokenizer, layout
        self.encoder = ExampleEncoder(tokenizer, layout, system)

    @classmethod
    def from_pretrained(cls, folder: str | Path, *, image_size: int | None = None) -> Processor:
        """Returns the processor of the model in a folder, or of the model that a run trains.

        Args:
            image_size: as given to `mllm_jax.from_pretrained`; None: the model's own.

        Raises:
            ConfigError: an option of the model's processor, or the image size, is not supported.
            DataError: there is no tokenizer.
        """
        from mllm_jax.models.registry import pretrained_config

        folder = Path(folder)
        if is_run(folder):
            if image_size is not None:
                raise ConfigError(
                    f"image_size={image_size} for the run {folder}",
                    "the size that it was trained with",
                    "leave it out, or set the size in the model of an experiment that begins with the run's export",
                )
            return cls.of_run(RunFolder(folder))
        config = pretrained_config(folder)
        config = config if image_size is None else with_image_size(config, image_size)
        with fitting(config, folder) as beside:
            return cls.of(config, beside)

    @classmethod
    def of_run(cls, run: RunFolder, experiment: Any = None) -> Processor:
        """Returns the processor of a run; reads the run's experiment if it is None."""
        experiment = run.experiment() if experiment is None else experiment
        config = experiment.tokenizer
        frames = dict(sampling=config.frames, frame_time=config.frame_time)
        return cls.of(experiment.model_of(), run.processor_folder, system=config.system, words=config.places, **frames)

    @classmethod
    def of(
        cls,
        config: Any,
        folder: Path,
        *,
        system: str | None = None,
        words: Sequence[str] = (),
        sampling: FrameSampling = FIVE_FRAMES,
        frame_time: str = "",
    ) -> Processor:
        """Returns the processor of a model, with the tokenizer (and a named model's processor files) of a folder.

        Args:
            words, sampling, frame_time: text before each media token of an image, the choice of a video's frames, and
                the text before each, for a composed model; see `TokenizerConfig`.
        """
        family = cls.family_of(config)
        if family is not None:
            layout = family.layout(config, folder)
            return cls(config, ChatTokenizer.load(folder, layout.template), layout, system)
        if not isinstance(config, (LLMConfig, ModelConfig)):
            raise ConfigError(
                f"{folder}: {config.family}", "a model that reads images", "use its tokenizer: ChatTokenizer.load"
            )
        if isinstance(config, LLMConfig):
            return cls(LanguageOnly(config), ChatTokenizer.load(folder), TextLayout(), system)
        tokenizer = tokenizer_in(folder)
        layout = composed_layout(config, tokenizer, words, sampling, frame_time, folder)
        return cls(config, tokenizer, layout, system)

    def of_composition(self, config: Any) -> Processor:
        """Returns the processor for another composition, which a stage trains on the same texts and images."""
        return Processor(config, self.tokenizer, self.layout, self.encoder.system)

    @staticmethod
    def family_of(config: Any) -> Family | None:
        """Returns the family of a named model with its own layout; None for a composed model."""
        from mllm_jax.models.registry import family_of_config

        family = None if config.family is None else family_of_config(config)
        return None if family is None or family.layout is None else family

    @property
    def family(self) -> Family | None:
        return self.family_of(self.config)

    # ---- for training

    def fingerprint(self) -> str:
        """Returns a text that differs if rows would differ."""
        return repr([self.config, self.encoder.fingerprint()])

    def encode(self, example: Example, max_length: int, learn: str = "answers") -> Encoded:
        """Lays out an example for the model; see `mllm_jax.data.processing.encode`."""
        plain = bool(example.messages) and example.messages[0].role == TEXT_ROLE
        reads = self.layout.instruction_length > 0
        if (self.config.encoder_decoder or reads) and not plain:
            self._require_one_turn(example)
        if self.config.encoder_decoder:
            llm = self.config.llm
            encoded = encode_answer(self.encoder, example, max_length, llm.decoder_start_token_id, _end_of(llm))
        elif plain:
            encoded = encode_text(self.encoder, example, max_length, learn)
        else:
            encoded = encode_turns(self.encoder, example, max_length, learn)
        asked = "" if plain else "\n".join(message.text for message in example.messages[:-1]).strip()
        return replace(encoded, instruction=self.layout.instruction(asked, bounded=True)) if reads else encoded

    def encode_captions(self, example: Example, max_length: int, most: int) -> Encoded:
        """Lays out the captions of an image."""
        return encode_captions(self.encoder, example, max_length, most, self.config.media_tokens)

    def _require_one_turn(self, example: Example) -> None:
        if (turns := require_answers(example.messages)) > 1:
            raise DataError(
                f"a conversation of {turns} turns",
                "one question and its answer, for an encoder-decoder, or a Q-Former that reads the question",
                "make each question a record of its own",
            )

    def spec(self, rows: int, length: int, slots: Mapping[str, int]) -> BatchSpec:
        """Returns the spec of a batch of rows of this length, with these slots for media by modality."""
        return self.layout.spec(self.config.batch_spec(rows, length, slots))

    def pack(self, rows: Sequence[Sequence[Encoded]], length: int, slots: Mapping[str, int]) -> dict[str, np.ndarray]:
        """Packs rows of several examples each into a batch."""
        return assemble(rows, self.spec(len(rows), length, slots), self.layout, slots)

    # ---- for generation

    def __call__(
        self,
        text: Conversation | Sequence[Conversation],
        images: Sequence[Any] | None = None,
        videos: Sequence[Any] | None = None,
        audios: Sequence[Any] | None = None,
        *,
        answers: str | Sequence[str] | None = None,
        slots: Mapping[str, int] | None = None,
        length: int | None = None,
        use_audio_in_video: bool = False,
    ) -> dict[str, np.ndarray]:
        """Makes a batch of one text, or of a list of texts.

        Args:
            text: a string with a placeholder for each medium, as the model's tokenizer spells it, or a conversation,
                see `mllm_jax.data.message.conversation`; a medium may be part of the message or given separately.
            images, videos, audios: in the order of their positions, over all texts; or a list of lists, one for each
                text. An image is uint8[H, W, 3], one of Pillow, a path or bytes; a video is a path, bytes or a
                `Video`; a sound is a path, bytes, (samples float[n], rate) or an `Audio`.
            answers: one for each text, for a batch to train on.
            slots: for media in each row, by modality, such as {"image": 2}; None: as many as this batch needs.
            length: of the rows; None: that of the longest text.
            use_audio_in_video: the model also hears the sound of every video's file; see `Video`.

        Returns:
            NumPy arrays by name, as `Multimodal` takes them; with `answers` also loss_weights.

        Raises:
            DataError: media and their placeholders do not match, a message contains a placeholder, the model does not
                take the media, they become too large (one, or all together, see `mllm_jax.data.pixels`), or a text is
                empty or longer than `length`.
        """
        texts = _texts(text)
        answers = [answers] if isinstance(answers, str) else answers
        if answers is not None and len(answers) != len(texts):
            raise DataError(
                f"{len(texts)} texts and {len(answers)} answers", "one answer for each text", "give one for each"
            )
        ids = [self._ids(each) for each in texts]
        given = {"image": images, "video": videos, "audio": audios}
        wanted = [self._wanted(each, found, given) for each, found in zip(texts, ids, strict=True)]
        shown = _shown(wanted, given)
        if use_audio_in_video:
            shown = [[with_sound(part) for part in row] for row in shown]
        media = self.layout.prepare_all(shown)
        encoded = [self._asked(*each) for each in zip(texts, ids, media, strict=True)]
        if answers is not None:
            encoded = [self.answered(e, answer) for e, answer in zip(encoded, answers, strict=True)]
        return self.batch(encoded, slots, length, learnt=answers is not None)

    def batch(
        self,
        encoded: Sequence[Encoded],
        slots: Mapping[str, int] | None = None,
        length: int | None = None,
        *,
        learnt: bool = False,
    ) -> dict[str, np.ndarray]:
        """Makes a batch of one example a row, as short as possible."""
        longest = max(len(e.tokens) for e in encoded)
        if not all(len(e.tokens) for e in encoded):
            raise DataError("an empty text", "at least one token", "leave it out")
        if length is not None and longest > length:
            raise DataError(
                f"a text of {longest} tokens, media included",
                f"at most {length}",
                "raise `length`, shorten the text or give it fewer images: media are never cut",
            )
        length = length or longest
        if slots is None:
            modalities = dict.fromkeys(modality for e in encoded for modality in e.slots)
            slots = {modality: max(e.slots.get(modality, 0) for e in encoded) for modality in modalities}
        spec = self.spec(len(encoded), length, slots)
        if self.config.encoder_decoder:
            spec = spec | self.config.target_spec(len(encoded), max(len(e.target) for e in encoded))
            spec = spec.without("decoder_positions")  # one target a row: its positions are 0, 1, ...
        if read := [len(e.instruction) for e in encoded if e.instruction is not None]:
            spec = spec | instruction_spec(len(encoded), slots["image"], -(-max(read) // BUCKET) * BUCKET)
        elif self.layout.instruction_length:
            spec = spec.without("query_tokens", "query_segments")
        if not learnt:
            spec = spec.without("loss_weights")
        return assemble([[e] for e in encoded], spec, self.layout, slots)

    def declared(self, batch: Mapping[str, np.ndarray]) -> BatchSpec:
        """Returns the spec of a batch that `batch` or `__call__` made."""
        rows, length = np.asarray(batch["tokens"]).shape
        held = {m: batch.keys() & self.config.branch(m).batch_spec(m, 1, 1).keys() for m in self.config.inputs}
        slots = {m: np.asarray(batch[min(names)]).shape[1] for m, names in held.items() if names}
        spec = self.spec(rows, length, slots)
        if "decoder_tokens" in batch:
            spec |= self.config.target_spec(rows, np.asarray(batch["decoder_tokens"]).shape[1])
        if "query_tokens" in batch:
            spec |= instruction_spec(rows, slots["image"], np.asarray(batch["query_tokens"]).shape[2])
        return spec

    def prompt(self, messages: Sequence[Message], *, plain: bool = False) -> Encoded:
        """Encodes a conversation that needs an answer; `plain`: its text alone, without a chat template."""
        media = self.encoder.media_of(messages, learned=False)
        media = [replace(m, arrays=dict(m.arrays)) for m in media]  # reads media here, so that bad ones are refused
        ids = self.encoder.text_ids(messages[0]) if plain else self._ids(messages)
        return self._asked(messages, ids, media)

    def decode(self, ids: Sequence[int]) -> str:
        """Decodes ids to text without special tokens."""
        return self.tokenizer.decode(ids)

    def _ids(self, text: str | Sequence[Message]) -> list[int]:
        if isinstance(text, str):
            return self.layout.without_names(self.tokenizer.encode(text))
        return self.encoder.ids_of(text)

    def _wanted(
        self, text: str | Sequence[Message], ids: Sequence[int], given: Mapping[str, Sequence[Any] | None]
    ) -> list[Part]:
        """Returns the media of a text; those without a source are given separately."""
        if isinstance(text, str):
            # A placeholder that kinds share is of a kind that is given, else of images.
            pairs = [*reversed(self.layout.placeholders.items())]
            kinds = {token: kind for kind, token in pairs}
            kinds |= {token: kind for kind, token in pairs if _number(given.get(kind))}
            return [MEDIA[kinds[i]]() for i in ids if i in kinds]
        return [part for message in text for part in message.parts if _is_medium(part)]

    def _asked(self, text: str | Sequence[Message], ids: list[int], media: Sequence[PreparedMedia]) -> Encoded:
        written = text if isinstance(text, str) else text[-1].text
        row = self.encoder.lay_out(ids, media, f"a text ({written[:60]!r})")
        encoded = Encoded(row, np.zeros(len(row.tokens), np.float32), media)
        if self.layout.instruction_length and media:
            encoded = replace(encoded, instruction=self.layout.instruction(written, bounded=False))
        if self.config.encoder_decoder:
            encoded = replace(encoded, target=np.asarray([self.config.llm.decoder_start_token_id]))
        return encoded

    def answered(self, encoded: Encoded, answer: str) -> Encoded:
        """Returns a prompt followed by its answer and the end token, which carry loss."""
        ids = [*self.tokenizer.ids(answer), _end_of(self.config.llm)]
        if encoded.target is not None:
            target = np.concatenate([encoded.target, ids])
            return replace(encoded, target=target, loss_weights=np.float32(np.arange(len(target)) > 0))
        weights = np.concatenate([encoded.loss_weights, np.ones(len(ids), np.float32)])
        return replace(encoded, row=encoded.row.followed_by(ids), loss_weights=weights)


def _is_medium(part: Part) -> bool:
    return not isinstance(part, Text)


def _end_of(llm: Any) -> int:
    end = llm.eos_token_id
    return end[0] if isinstance(end, tuple) else end


def _texts(text: Any) -> list[str | tuple[Message, ...]]:
    """Returns strings unchanged, and conversations as messages."""
    given = [text] if isinstance(text, str) or not (text and all(isinstance(each, str) for each in text)) else text
    texts: list[str | tuple[Message, ...]] = []
    for each in given:
        texts += [each] if isinstance(each, str) else conversations(each)[0]
    if not texts:
        raise DataError("no text", "at least one", "give a text, or a list of them")
    return texts


def _shown(texts: list[list[Part]], given: Mapping[str, Sequence[Any] | None]) -> list[list[Part]]:
    """Returns each text's media in the order of its positions: those in its messages, and those given separately."""
    rows: list[list[Part]] = [[] for _ in texts]
    dealt = {}
    for kind, things in given.items():
        missing = [sum(isinstance(p, MEDIA[kind]) and p.source is None for p in text) for text in texts]
        dealt[kind] = _deal(things, kind, missing)
    for row, text, *shares in zip(rows, texts, *dealt.values(), strict=True):
        left = dict(zip(dealt, map(list, shares), strict=True))
        for part in text:
            kind = type(part).__name__.lower()
            if part.source is not None:
                row.append(part)
            elif left[kind]:
                row.append(_medium(part, left[kind].pop(0)))
        # A wrong number is found when the positions are counted; some models' texts have none.
        row += [_medium(MEDIA[kind](), thing) for kind, things in left.items() for thing in things]
    return rows


def _holds(things: Sequence[Any], kind: str) -> bool:
    """Returns whether a list holds the media of one text; of videos, parts alone: other lists are frames. A tuple may
    be the samples of a sound and their rate."""
    anything = kind == "image" or (kind == "audio" and isinstance(things, list))
    return anything or all(isinstance(thing, MEDIA[kind]) for thing in things)


def _medium(part: Part, thing: Any) -> Part:
    """Returns a medium that was given separately: the part itself, or its source."""
    return thing if isinstance(thing, type(part)) else replace(part, source=thing)


def _number(given: Sequence[Any] | None) -> int:
    return 0 if given is None else len(given)


def _deal(given: Sequence[Any] | None, kind: str, missing: Sequence[int]) -> list[list[Any]]:
    """Distributes separately given media to the texts.

    Args:
        missing: the number of media that each text asks for.
    """
    given = list(given) if _number(given) else []
    dealt = None
    if given and all(isinstance(each, (list, tuple)) and _holds(each, kind) for each in given):
        dealt = [list(each) for each in given]
    elif len(missing) == 1:
        dealt = [given]
    elif len(given) == sum(missing):
        stops = np.cumsum(missing)
        dealt = [given[stop - count : stop] for stop, count in zip(stops, missing, strict=True)]
    elif not any(missing) and len(given) == len(missing):
        dealt = [[each] for each in given]  # for models whose prompts have no placeholders
    if dealt is None or len(dealt) != len(missing):
        raise DataError(
            f"{len(given)} {kind}(s) for {len(missing)} texts that ask for {list(missing)}",
            "the number that the texts ask for, or a list for each text",
            "give each text its own list",
        )
    return dealt
