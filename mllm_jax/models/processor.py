"""From conversations with pictures to a batch, as the checkpoint's authors prepare them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from mllm_jax.data.chat import ChatTokenizer
from mllm_jax.data.image_steps import ImageProcessor
from mllm_jax.data.images import as_picture
from mllm_jax.data.media import Collated, Media, Row, collate_tiles, lay_out_row
from mllm_jax.data.pixels import require_call
from mllm_jax.errors import ConfigError, DataError
from mllm_jax.models.multimodal import MultimodalConfig

Message = Mapping[str, Any]  # {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "..."}]}
Text = str | Sequence[Message]


class Layout:
    """How a model's pictures are prepared and where they stand in its text; a named model has one of its own.

    Attributes:
        image_token, video_token: the id that stands for one picture or video in a text, as the chat template writes
            it; None: the model takes none.
        neighbours: the most media tokens whose sum stands at one place.
        places_pictures: whether prompts name no place for a picture, so that `arrange` puts it where it belongs.
        instruction_length: the most tokens that the projector reads of an instruction in training; 0: it reads none.
        pictures, frames: what prepares images, and frames of videos where that is another; None: no `ImageProcessor`.
    """

    image_token: int | None = None
    video_token: int | None = None
    neighbours: int = 1
    places_pictures: bool = False
    instruction_length: int = 0
    pictures: ImageProcessor | None = None
    frames: ImageProcessor | None = None

    def image(self, picture: np.ndarray) -> Media:
        """uint8[H, W, 3] as decoded, prepared."""
        raise NotImplementedError

    def images(self, pictures: Sequence[np.ndarray]) -> list[Media]:
        """The pictures of one text; some models prepare one that is alone otherwise than one of several."""
        return [self.image(picture) for picture in pictures]

    def video(self, frames: np.ndarray) -> Media:
        """uint8[F, H, W, 3], the frames that the model is to see, prepared."""
        raise NotImplementedError

    def arrange(self, ids: list[int], media: int) -> list[int]:
        """The ids of a text that is to have so many pictures, with a placeholder for each; here they have to be there.

        Models whose prompts name no place for the picture put it where it belongs.
        """
        return ids

    def without_names(self, ids: Sequence[int]) -> list[int]:
        """The ids of a text without the names of its pictures, where the model's texts have any behind placeholders."""
        return list(ids)

    def collate(self, rows: Sequence[Sequence[Media]], slots: int | None = None) -> Collated:
        """The media of a batch as arrays with one shape for every row."""
        raise NotImplementedError

    def text_inputs(self, texts: Sequence[str], rows: Sequence[Sequence[Media]], slots: int | None) -> dict:
        """What the projector reads of each row's text, by its names in a batch; most read nothing."""
        return {}

    def instruction(self, text: str) -> np.ndarray:
        """The ids int[n] that the projector reads of one text, where `instruction_length` is not 0."""
        raise NotImplementedError

    def positions(self, rows: Sequence[Row], media: Sequence[Sequence[Media]], length: int) -> np.ndarray | None:
        """int[B, length, 3] for M-RoPE; None: positions count the tokens."""
        return None


class TileLayout(Layout):
    """Pictures as tiles of one size, each of which takes `tokens_a_tile` media tokens."""

    tokens_a_tile: int

    def collate(self, rows: Sequence[Sequence[Media]], slots: int | None = None) -> Collated:
        collated = collate_tiles(rows, self.tokens_a_tile, slots)
        if slots and not collated.arrays:
            # Batches without any picture keep the shapes of those with some, so that one program serves both.
            blank = self.image(np.zeros((32, 32, 3), np.uint8)).arrays
            made = {name: np.zeros((len(rows), slots, *tile.shape[1:]), tile.dtype) for name, tile in blank.items()}
            collated = replace(collated, arrays=made)
        return collated


class Processor:
    """Texts with pictures to batches.

    Args:
        config: the model's.
        tokenizer: with the chat template of the checkpoint's authors.
        layout: the model's.
    """

    def __init__(self, config: MultimodalConfig, tokenizer: ChatTokenizer, layout: Layout):
        self.config, self.tokenizer, self.layout = config, tokenizer, layout
        names = tokenizer.backend.convert_ids_to_tokens
        tokens = {"image": layout.image_token, "video": layout.video_token}
        self._placeholders = {kind: token for kind, token in tokens.items() if token is not None}
        self._reserved = tuple(names(token) for token in self._placeholders.values())

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> Processor:
        """The processor of the model in a folder.

        Raises:
            ConfigError: a model that reads no media, or an option of its processor that is not supported.
            DataError: no tokenizer.
        """
        from mllm_jax.models.registry import family_of_config, pretrained_config

        config = pretrained_config(folder)
        family = family_of_config(config)
        if family.layout is None:
            raise ConfigError(
                f"{folder}: {family.name}", "a model that reads pictures", "use its tokenizer: ChatTokenizer.load"
            )
        return cls(config, ChatTokenizer.load(folder), family.layout(config, Path(folder)))

    def __call__(
        self,
        text: Text | Sequence[Text],
        images: Sequence[Any] | None = None,
        videos: Sequence[Any] | None = None,
        audios: Sequence[Any] | None = None,
        *,
        answers: str | Sequence[str] | None = None,
        slots: int | None = None,
        length: int | None = None,
    ) -> dict[str, np.ndarray]:
        """A batch of one text, or of a list of texts.

        Args:
            text: a string with a placeholder for each picture, as the model's tokenizer spells it, or a conversation:
                messages whose content is a string or a list of {"type": "text", "text": ...}, {"type": "image"} and
                {"type": "video"}; a picture may stand in the message, as "image", or in `images`.
            images, videos: in the order of their places, over all texts; or a list of lists, one for each text. A
                picture is uint8[H, W, 3], one of Pillow, a path or bytes; a video is a list of them, or an array.
            answers: one for each text; the batch is then one to train on.
            slots: places for pictures in each row, see the model's layout; None is what this batch needs.
            length: of the rows; None is the longest text.

        Returns:
            NumPy arrays by name, as `Multimodal` takes them; with `answers` also loss_weights.

        Raises:
            DataError: pictures and their places do not match, a text that spells a placeholder in a message, pictures
                that the model does not take or that become too large (one, or all together, see
                `mllm_jax.data.pixels`), a text longer than `length` or without anything in it.
        """
        if audios:
            raise DataError(
                f"{len(audios)} sound(s) for a {type(self.config).__name__}",
                "pictures or videos: it has no encoder for sounds",
                "leave them out",
            )
        one = isinstance(text, str) or (len(text) > 0 and isinstance(text[0], Mapping))
        texts = [text] if one else list(text)
        if not texts:
            raise DataError("no text", "at least one", "give a text, or a list of them")
        answers = [answers] if isinstance(answers, str) else answers
        if answers is not None and len(answers) != len(texts):
            raise DataError(f"{len(texts)} texts and {len(answers)} answers", "one for each", "give as many")
        read = [self._read(each) for each in texts]
        shown = self._shown(read, {"image": images, "video": videos})
        media, pixels = [], 0
        for row in shown:
            decoded = _decoded(row)
            pixels += sum(self._pixels(kind, frames) for kind, frames in decoded)
            require_call(pixels, "prepared images and frames")
            media.append(self._prepare(decoded))
        rows = [
            self.lay_out(one_text.ids, row, f"a text ({one_text.written[:60]!r})")
            for one_text, row in zip(read, media, strict=True)
        ]
        return self._batch(rows, media, [each.written for each in read], answers, slots, length)

    @property
    def placeholders(self) -> tuple[int, ...]:
        """The ids that stand for a picture or video in a text."""
        return tuple(self._placeholders.values())

    def ids_of(self, messages: Sequence[Message], add_generation_prompt: bool = True) -> list[int]:
        """A conversation to ids with a placeholder for each picture.

        Raises:
            DataError: a message that spells a placeholder, or that the chat template refuses.
        """
        return self._read(messages, add_generation_prompt).ids

    def lay_out(self, ids: Sequence[int], media: Sequence[Media], what: str) -> Row:
        """A text with media tokens in the places of its pictures; `what` it is, for the message of a DataError."""
        return lay_out_row(self.layout.arrange(list(ids), len(media)), media, self.placeholders, what)

    def ids_of_text(self, text: str) -> list[int]:
        """A text of a message without a chat template around it. Raises DataError: one that spells a placeholder."""
        self._refuse_placeholders(text)
        return self.tokenizer.encode(text)

    def target_of(self, answer: str) -> list[int]:
        """What an encoder-decoder's decoder reads to say an answer, and its end."""
        return [self.config.llm.decoder_start_token_id, *self._answer(answer)]

    def decode(self, ids: Sequence[int]) -> str:
        """Ids to text, special tokens left out."""
        return self.tokenizer.decode(ids)

    # ---- texts and their pictures

    def _read(self, text: Text, add_generation_prompt: bool = True) -> _Read:
        if isinstance(text, str):
            ids = self.layout.without_names(self.tokenizer.encode(text))
            return _Read(ids, text, [(kind, None) for i in ids for kind, p in self._placeholders.items() if i == p])
        messages, wanted = [], []
        for message in text:
            parts = message["content"]
            plain = isinstance(parts, str)
            for part in [dict(type="text", text=parts)] if plain else parts:
                if part["type"] == "text":
                    self._refuse_placeholders(part["text"])
                elif part["type"] in self._placeholders:
                    wanted.append((part["type"], part.get(part["type"], part.get("path"))))
                else:
                    raise DataError(
                        f"a message with a part of type {part['type']!r}",
                        f"text{''.join(f', {kind}' for kind in self._placeholders)}",
                        "change the type, or take a model that reads it",
                    )
            shown = parts if plain else [{n: part[n] for n in ("type", "text") if n in part} for part in parts]
            messages.append({**message, "content": shown})
        ids = self.layout.without_names(self.tokenizer.encode_chat(messages, add_generation_prompt))
        return _Read(ids, _text_of(messages[-1]["content"]), wanted)

    def _shown(self, texts: list[_Read], given: Mapping[str, Sequence[Any] | None]) -> list[list[tuple[str, Any]]]:
        """Each text's media in the order of its places: what a message brought along, else what was given beside."""
        rows: list[list[tuple[str, Any]]] = [[] for _ in texts]
        dealt = {}
        for kind, things in given.items():
            missing = [sum(k == kind and thing is None for k, thing in text.wanted) for text in texts]
            dealt[kind] = _deal(things, kind, missing)
        for row, text, *shares in zip(rows, texts, *dealt.values(), strict=True):
            left = dict(zip(dealt, map(list, shares), strict=True))
            for kind, thing in text.wanted:
                if thing is not None or left[kind]:
                    row.append((kind, left[kind].pop(0) if thing is None else thing))
            # Too many or too few are told of when the places are counted; some models' texts have none.
            row += [(kind, thing) for kind, things in left.items() for thing in things]
        return rows

    def _refuse_placeholders(self, text: str) -> None:
        for reserved in self._reserved:
            if reserved in text:
                raise DataError(
                    f"a message whose text has {reserved!r} in it ({text[:60]!r})",
                    "text, in which this would become a place for a picture",
                    'take it out, and give pictures as parts {"type": "image"} of the content',
                )

    def _pixels(self, kind: str, frames: Sequence[np.ndarray]) -> int:
        """How many pixels will be made of an image or of the frames of a video."""
        sizes = [frame.shape[:2] for frame in frames]
        if kind == "image":
            return sum(self.layout.pictures.pixels(*size) for size in sizes) if self.layout.pictures else 0
        reader = self.layout.frames or self.layout.pictures
        return sum(math.prod(reader.output_size(*size)) for size in sizes) if reader else 0

    def _prepare(self, row: list[tuple[str, list[np.ndarray]]]) -> list[Media]:
        """The media of one text, in its order."""
        images = iter(self.layout.images([frames[0] for kind, frames in row if kind == "image"]))
        return [next(images) if kind == "image" else self._video(frames) for kind, frames in row]

    def _video(self, frames: list[np.ndarray]) -> Media:
        if not frames or len({frame.shape for frame in frames}) > 1:
            raise DataError(f"a video of {len(frames)} frames", "frames of one size", "resize them")
        return self.layout.video(np.stack(frames))

    # ---- arrays

    def _batch(
        self,
        rows: list[Row],
        media: list[list[Media]],
        texts: list[str],
        answers: Sequence[str] | None,
        slots: int | None,
        length: int | None,
    ) -> dict[str, np.ndarray]:
        decodes = self.config.encoder_decoder
        learnt = [len(row.tokens) for row in rows]  # where what is learnt begins
        if answers is not None and not decodes:
            rows = [row.followed_by(self._answer(answer)) for row, answer in zip(rows, answers, strict=True)]
        longest = max(len(row.tokens) for row in rows)
        if min(len(row.tokens) for row in rows) == 0 or longest > (length or longest):
            raise DataError(
                f"texts of {[len(row.tokens) for row in rows]} tokens, media included",
                f"1 to {length}" if length else "at least 1",
                "shorten the text or give it fewer pictures: media are never cut",
            )
        length = length or longest
        collated = self.layout.collate(media, slots)
        index = np.full((len(rows), length, max(row.places.shape[1] for row in rows)), -1, np.int32)
        weights = np.zeros(index.shape, np.float32)
        tokens = np.full((len(rows), length), self.tokenizer.pad_token_id or 0, np.int32)
        segments = np.zeros_like(tokens)
        for r, (row, first) in enumerate(zip(rows, collated.first, strict=True)):
            here = slice(0, len(row.tokens))
            tokens[r, here], segments[r, here] = row.tokens, 1
            wide = slice(0, row.places.shape[1])
            found = row.media_index(first, collated.newline)
            index[r, here] = found[:, :1]  # those beyond its own have no weight
            index[r, here, wide], weights[r, here, wide] = found, row.weights
        positions = self.layout.positions(rows, media, length)
        batch = dict(tokens=tokens, segments=segments, media_index=index[..., 0], **collated.arrays)
        batch["positions"] = np.where(segments > 0, np.arange(length), 0) if positions is None else positions
        batch["positions"] = batch["positions"].astype(np.int32)
        if index.shape[-1] > 1:
            batch |= dict(media_index=index, media_weights=weights)
        batch |= self.layout.text_inputs(texts, media, slots)
        if decodes:
            return batch | self._targets(answers, len(rows))
        if answers is not None:
            batch["loss_weights"] = np.float32((np.arange(length) >= np.array(learnt)[:, None]) & (segments > 0))
        return batch

    def _answer(self, answer: str) -> list[int]:
        ids = self.tokenizer.backend(answer, add_special_tokens=False)["input_ids"]
        end = self.config.llm.eos_token_id
        return [*ids, end[0] if isinstance(end, tuple) else end]

    def _targets(self, answers: Sequence[str] | None, rows: int) -> dict[str, np.ndarray]:
        """What an encoder-decoder is to say; without answers only the token that everything begins with."""
        start = self.config.llm.decoder_start_token_id
        texts = [self.target_of(answer) for answer in answers] if answers is not None else [[start]] * rows
        shape = (rows, max(map(len, texts)))
        tokens, segments = np.zeros(shape, np.int32), np.zeros(shape, np.int32)
        for r, ids in enumerate(texts):
            tokens[r, : len(ids)], segments[r, : len(ids)] = ids, 1
        targets = dict(decoder_tokens=tokens, decoder_segments=segments)
        if answers is None:
            return targets
        return targets | dict(loss_weights=np.float32((segments > 0) & (np.arange(shape[1]) > 0)))


def _decoded(row: list[tuple[str, Any]]) -> list[tuple[str, list[np.ndarray]]]:
    """The media of one text: an image is one frame. Raises DataError: see `as_picture`, or too many pixels."""
    media, pixels = [], 0
    for kind, thing in row:
        frames = []
        for frame in [thing] if kind == "image" else thing:
            frames.append(as_picture(frame))
            pixels += math.prod(frames[-1].shape[:2])
            require_call(pixels, "images and frames of one text")
        media.append((kind, frames))
    return media


@dataclass(frozen=True)
class _Read:
    """A text as ids, as it was written (for messages), and the media that it asks for, with those it brings along."""

    ids: list[int]
    written: str
    wanted: list[tuple[str, Any]]


def _text_of(content: str | Sequence[Mapping[str, str]]) -> str:
    """What a message says, without its pictures."""
    return content if isinstance(content, str) else " ".join(part["text"] for part in content if "text" in part)


def _deal(given: Sequence[Any] | None, kind: str, missing: Sequence[int]) -> list[list[Any]]:
    """Pictures given beside the texts, to each text its own.

    Args:
        missing: how many each text asks for.
    """
    given = [] if given is None else list(given)
    dealt = None
    if kind == "image" and given and all(isinstance(each, (list, tuple)) for each in given):
        dealt = [list(each) for each in given]
    elif len(missing) == 1:
        dealt = [given]
    elif len(given) == sum(missing):
        stops = np.cumsum(missing)
        dealt = [given[stop - count : stop] for stop, count in zip(stops, missing, strict=True)]
    elif not any(missing) and len(given) == len(missing):
        dealt = [[each] for each in given]  # of models whose prompts name no place
    if dealt is None or len(dealt) != len(missing):
        raise DataError(
            f"{len(given)} {kind}(s) for {len(missing)} texts that ask for {list(missing)}",
            "as many as the texts ask for, or a list for each text",
            "give each text its own list",
        )
    return dealt
