"""Generation with a key-value cache: prefill and decode in one compiled function a bucket of prompt lengths."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from mllm_jax.data.templates import encode_prompt
from mllm_jax.data.tokenizer import Tokenizer
from mllm_jax.errors import DataError
from mllm_jax.inference.sampling import Sampling, choose
from mllm_jax.models.multimodal import Multimodal
from mllm_jax.sharding.logical import use_mesh
from mllm_jax.sharding.mesh import batch_sharding

BUCKET = 32


@dataclass(frozen=True)
class Prompt:
    """A question about pictures: uint8[H, W, 3] each, of the encoder's size, in order."""

    question: str
    images: tuple[np.ndarray, ...] = ()


class Generator:
    """Answers prompts with a trained model.

    Rows are padded to a bucket and to a full batch; a greedy answer does not depend on its neighbours, a sampled one
    is drawn by seed and row.

    Args:
        batch_size: rows that are answered together.
    """

    def __init__(
        self,
        model: Multimodal,
        params: dict,
        tokenizer: Tokenizer,
        mesh: Mesh,
        *,
        batch_size: int = 64,
        max_new_tokens=32,
    ):
        self.model, self.params, self.tokenizer, self.mesh = model, params, tokenizer, mesh
        self.batch_size, self.max_new_tokens = batch_size, max_new_tokens
        self._encode = jax.jit(partial(model.apply, method="encode_media"))
        self._answer = jax.jit(self._run, static_argnames=("sampling",))

    def encode_images(self, images: Sequence[np.ndarray]) -> np.ndarray:
        """Pictures uint8[H, W, 3] to projected media tokens float32[n, T, E]."""
        side = self.model.config.encoder.image_size
        for image in images:
            if image.shape != (side, side, 3):
                raise DataError(f"a picture of shape {image.shape}", f"({side}, {side}, 3)", "resize it first")
        out = []
        for start in range(0, len(images), self.batch_size):
            chunk = np.stack(images[start : start + self.batch_size])[:, None]
            media = self._encode({"params": self.params}, self._place(_pad_rows(chunk, self.batch_size)))
            out.append(np.asarray(media, np.float32)[: len(chunk)])
        return np.concatenate(out)

    def answer(
        self, questions: Sequence[str], media: Sequence[np.ndarray | None], sampling: Sampling = Sampling()
    ) -> list[str]:
        """Texts that answer the questions, each about its own encoded pictures.

        Args:
            media: for each question float32[num_images * T, E], or None for a question without pictures.
        """
        tokens_each = self.model.config.media_tokens
        encoded = [
            encode_prompt(q, 0 if m is None else len(m) // tokens_each, self.tokenizer, tokens_each)
            for q, m in zip(questions, media, strict=True)
        ]
        # Prompts of one bucket and one number of pictures go together, so that shapes repeat.
        order = sorted(range(len(encoded)), key=lambda i: (encoded[i].num_images, len(encoded[i].tokens)))
        answers = [""] * len(encoded)
        while order:
            images = encoded[order[0]].num_images
            chunk = [i for i in order[: self.batch_size] if encoded[i].num_images == images]
            order = order[len(chunk) :]
            texts = self._answer_chunk([encoded[i] for i in chunk], [media[i] for i in chunk], images, sampling)
            for i, text in zip(chunk, texts, strict=True):
                answers[i] = text
        return answers

    def generate(self, prompts: Sequence[Prompt], sampling: Sampling = Sampling()) -> list[str]:
        """Texts that answer the prompts."""
        images = [image for prompt in prompts for image in prompt.images]
        encoded = iter(self.encode_images(images)) if images else iter(())
        media = [np.concatenate([next(encoded) for _ in p.images]) if p.images else None for p in prompts]
        return self.answer([p.question for p in prompts], media, sampling)

    def _answer_chunk(self, encoded, media, images: int, sampling: Sampling) -> list[str]:
        longest = max(len(e.tokens) for e in encoded)
        length = -(-longest // BUCKET) * BUCKET
        batch = {
            "tokens": np.full((self.batch_size, length), self.tokenizer.pad, np.int32),
            "positions": np.tile(np.arange(length, dtype=np.int32), (self.batch_size, 1)),
            "segments": np.zeros((self.batch_size, length), np.int32),
            "media_index": np.full((self.batch_size, length), -1, np.int32),
        }
        for r, e in enumerate(encoded):
            batch["tokens"][r, : len(e.tokens)] = e.tokens
            batch["segments"][r, : len(e.tokens)] = 1
            batch["media_index"][r, : len(e.tokens)] = e.media_index
        # Rows without a prompt hold one token, so that every row has something to read.
        batch["segments"][len(encoded) :, 0] = 1
        if images:
            batch["media"] = _pad_rows(np.stack(media), self.batch_size)
        batch = {name: self._place(array) for name, array in batch.items()}
        ids = np.asarray(self._answer(self.params, batch, jax.random.key(sampling.seed), sampling=sampling))
        return [self.tokenizer.decode(_until(row, self.tokenizer.eos)) for row in ids[: len(encoded)]]

    def _place(self, array: np.ndarray) -> jax.Array:
        return jax.device_put(array, batch_sharding(self.mesh, array.ndim, array.shape))

    def _run(self, params, batch, key, *, sampling: Sampling):
        """Prefill, then one token at a time until every row has ended: int32[B, max_new_tokens]."""
        with use_mesh(self.mesh):
            rows, length = batch["tokens"].shape
            eos, new = self.tokenizer.eos, self.max_new_tokens
            cache = self.model.config.llm.make_cache(rows, length + new)
            logits, cache = self.model.apply({"params": params}, batch, cache=cache)
            last = jnp.take_along_axis(logits, (cache.length - 1)[:, None, None], axis=1)[:, 0]
            first = choose(last, jax.random.fold_in(key, 0), sampling)
            out = jnp.full((rows, new), eos, jnp.int32).at[:, 0].set(first)

            def going(carry):
                i, token, ended, *_ = carry
                return (i < new) & ~ended.all()

            def body(carry):
                i, token, ended, out, cache = carry
                one = jnp.ones((rows, 1), jnp.int32)
                step = {
                    "tokens": token[:, None],
                    "positions": cache.length[:, None],
                    "segments": one,
                    "media_index": -one,
                }
                logits, cache = self.model.apply({"params": params}, step, cache=cache)
                token = choose(logits[:, 0], jax.random.fold_in(key, i), sampling)
                token = jnp.where(ended, eos, token)
                return i + 1, token, ended | (token == eos), out.at[:, i].set(token), cache

            start = (jnp.int32(1), first, first == eos, out, cache)
            return jax.lax.while_loop(going, body, start)[3]


def _pad_rows(array: np.ndarray, rows: int) -> np.ndarray:
    return np.pad(array, [(0, rows - len(array))] + [(0, 0)] * (array.ndim - 1))


def _until(ids: np.ndarray, stop: int) -> np.ndarray:
    ends = np.flatnonzero(ids == stop)
    return ids[: ends[0]] if len(ends) else ids
