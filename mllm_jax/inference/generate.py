"""Answers about pictures: the composed model, with its own tokenizer and conversation template."""

from __future__ import annotations

from collections.abc import Generator as Stream
from collections.abc import Sequence
from dataclasses import dataclass

import jax
import numpy as np
from jax.sharding import Mesh

from mllm_jax.data.templates import Encoded, encode_prompt
from mllm_jax.data.tokenizer import Tokenizer
from mllm_jax.errors import DataError
from mllm_jax.inference.answers import Answers, Request
from mllm_jax.inference.engine import Engine, bucket
from mllm_jax.inference.options import Completion, Options
from mllm_jax.inference.sampling import Sampling
from mllm_jax.models.multimodal import Multimodal
from mllm_jax.sharding.hosts import fetch


@dataclass(frozen=True)
class Prompt:
    """A question about pictures: uint8[H, W, 3] each, of the encoder's size, in order."""

    question: str
    images: tuple[np.ndarray, ...] = ()


class Generator:
    """Answers prompts with a trained model.

    Rows are padded to a bucket and to a full batch. An answer does not depend on its neighbours; a sampled one is drawn
    by the seed and its prompt's place in the list.

    Args:
        batch_size: rows that are answered together.
        by_layer: see `LanguageSteps`; False compiles faster and decodes more slowly, which suits a single question.
    """

    def __init__(
        self,
        model: Multimodal,
        params: dict,
        tokenizer: Tokenizer,
        mesh: Mesh,
        *,
        batch_size: int = 64,
        max_new_tokens: int = 32,
        by_layer: bool | None = None,
    ):
        self.model, self.params, self.tokenizer, self.mesh = model, params, tokenizer, mesh
        self.batch_size, self.max_new_tokens = batch_size, max_new_tokens
        self._encode = jax.jit(lambda p, x: model.apply({"params": p}, {"images": x}, method="encode_media").tokens)
        self._answers = Answers(Engine(model, params, mesh, by_layer=by_layer))

    def encode_images(self, images: Sequence[np.ndarray]) -> np.ndarray:
        """Pictures uint8[H, W, 3] to projected media tokens float32[n, T, E]."""
        side = self.model.config.encoder.image_size
        for image in images:
            if image.shape != (side, side, 3):
                raise DataError(f"a picture of shape {image.shape}", f"({side}, {side}, 3)", "resize it first")
        out = []
        for start in range(0, len(images), self.batch_size):
            chunk = np.stack(images[start : start + self.batch_size])[:, None]
            pixels = self._answers.engine.place(_pad_rows(chunk, self.batch_size))
            media = self._encode(self.params, pixels)
            out.append(fetch(media).astype(np.float32)[: len(chunk)])
        return np.concatenate(out)

    def answer(
        self, questions: Sequence[str], media: Sequence[np.ndarray | None], sampling: Sampling = Sampling()
    ) -> list[str]:
        """Texts that answer the questions, each about its own encoded images.

        Args:
            media: for each question float32[num_images * T, E], or None for a question without images.
        """
        return [completion.text for completion in self._complete(questions, media, sampling)]

    def generate(self, prompts: Sequence[Prompt], sampling: Sampling = Sampling()) -> list[str]:
        """Texts that answer the prompts."""
        return [completion.text for completion in self.complete(prompts, sampling)]

    def complete(self, prompts: Sequence[Prompt], sampling: Sampling = Sampling()) -> list[Completion]:
        """The answers to the prompts, which also say whether they were cut off."""
        images = [image for prompt in prompts for image in prompt.images]
        encoded = iter(self.encode_images(images)) if images else iter(())
        media = [np.concatenate([next(encoded) for _ in p.images]) if p.images else None for p in prompts]
        return self._complete([p.question for p in prompts], media, sampling)

    def _complete(
        self, questions: Sequence[str], media: Sequence[np.ndarray | None], sampling: Sampling
    ) -> list[Completion]:
        encoded = [self._encode_question(q, m) for q, m in zip(questions, media, strict=True)]
        # Prompts of one bucket and one number of pictures go together, so that shapes repeat.
        order = sorted(range(len(encoded)), key=lambda i: (encoded[i].num_images, len(encoded[i].tokens)))
        answers: dict[int, Completion] = {}
        while order:
            images = encoded[order[0]].num_images
            chunk = [i for i in order[: self.batch_size] if encoded[i].num_images == images]
            order = order[len(chunk) :]
            batch = self._batch([encoded[i] for i in chunk], [media[i] for i in chunk], self.batch_size)
            answers |= zip(chunk, self._answers.complete(batch, self._request(chunk, sampling)), strict=True)
        return [answers[i] for i in range(len(encoded))]

    def stream(self, prompt: Prompt, sampling: Sampling = Sampling()) -> Stream[str, None, Completion]:
        """Yields the answer piece by piece and returns it whole."""
        media = np.concatenate(self.encode_images(prompt.images)) if prompt.images else None
        batch = self._batch([self._encode_question(prompt.question, media)], [media], self.batch_size)
        pieces = self._answers.stream(batch, self._request([0], sampling))
        while True:
            try:
                yield next(pieces)[0]
            except StopIteration as end:
                return end.value[0]

    def _encode_question(self, question: str, media: np.ndarray | None) -> Encoded:
        each = self.model.config.media_tokens
        return encode_prompt(question, 0 if media is None else len(media) // each, self.tokenizer, each)

    def _request(self, indices: list[int], sampling: Sampling) -> Request:
        return Request(
            limits=[self.max_new_tokens] * len(indices),
            indices=indices,
            stops=(self.tokenizer.eos,),
            decode=self.tokenizer.decode,
            sampling=sampling,
            options=Options(max_new_tokens=self.max_new_tokens),
        )

    def _batch(self, encoded: list[Encoded], media: list[np.ndarray | None], rows: int) -> dict:
        length = bucket(max(len(e.tokens) for e in encoded))
        batch = {
            "tokens": np.full((rows, length), self.tokenizer.pad, np.int32),
            "positions": np.tile(np.arange(length, dtype=np.int32), (rows, 1)),
            "segments": np.zeros((rows, length), np.int32),
            "media_index": np.full((rows, length), -1, np.int32),
        }
        for r, e in enumerate(encoded):
            batch["tokens"][r, : len(e.tokens)] = e.tokens
            batch["segments"][r, : len(e.tokens)] = 1
            batch["media_index"][r, : len(e.tokens)] = e.media_index
        # Rows without a prompt hold one token, so that every row has something to read.
        batch["segments"][len(encoded) :, 0] = 1
        if encoded[0].num_images:
            batch["media"] = _pad_rows(np.stack(media), rows)
        return {name: self._answers.engine.place(array) for name, array in batch.items()}


def _pad_rows(array: np.ndarray, rows: int) -> np.ndarray:
    return np.pad(array, [(0, rows - len(array))] + [(0, 0)] * (array.ndim - 1))
