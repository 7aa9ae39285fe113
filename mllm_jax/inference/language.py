"""Texts from a language model: decoder-only or encoder-decoder, prompts as text, conversations or ids."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jax.sharding import Mesh

from mllm_jax.data.chat import ChatTokenizer, Message
from mllm_jax.errors import ConfigError, DataError
from mllm_jax.inference.answers import Answers, Request
from mllm_jax.inference.engine import Engine, bucket
from mllm_jax.inference.options import Completion, Options, longest_text
from mllm_jax.inference.quantize import TensorError, quantize
from mllm_jax.inference.sampling import Sampling
from mllm_jax.inference.steps import Batch, steps_of

Prompt = str | Sequence[int] | Sequence[Message]


def require_language(config: Any, folder: str | Path) -> None:
    """Refuses the config of a model that is no language model; they alone make a cache for what they have read.

    Raises:
        ConfigError: an encoder, or a model of an encoder and a language model.
    """
    if hasattr(config, "make_cache"):
        return
    reads_images = f"ask it one question at a time: mllm generate {folder} --image cat.png QUESTION"
    raise ConfigError(
        f"{folder}, which holds a {getattr(config, 'family', None) or type(config).__name__}",
        "a language model",
        reads_images if hasattr(config, "llm") else "name another folder; `mllm embed` compares images and texts",
    )


class LanguageGenerator:
    """Continues prompts, many at a time.

    In float32 a prompt gets the same tokens alone and in any company. A sampled answer is drawn by the seed and the
    prompt's place in the list.

    Args:
        module, params: as `mllm_jax.from_pretrained` gives them.
        tokenizer: needed for prompts that are text, for text in the completions, and for stop strings.
        mesh: what params are sharded over, if over anything.
        batch_size: prompts that are answered together.
        max_length: tokens of a prompt and its answer together, of either for an encoder-decoder; None is the config's
            `max_position_embeddings`.
        int8: store the linear kernels as int8; `quantization_errors` then says what that cost.
        by_layer: see `LanguageSteps`.
    """

    def __init__(
        self,
        module: nn.Module,
        params: dict,
        tokenizer: ChatTokenizer | None = None,
        *,
        mesh: Mesh | None = None,
        batch_size: int = 8,
        max_length: int | None = None,
        int8: bool = False,
        by_layer: bool | None = None,
    ):
        self.config, self.tokenizer, self.batch_size = module.config, tokenizer, batch_size
        self.max_length = longest_text(module.config, max_length)
        self.quantization_errors: list[TensorError] = []
        if int8:
            steps, ones = steps_of(module, by_layer=False), jnp.ones((1, 1), jnp.int32)
            params, self.quantization_errors = quantize(
                lambda p: steps.prefill(p, {"tokens": ones, "segments": ones}, 1), params
            )
        self._answers = Answers(Engine(module, params, mesh, by_layer=by_layer))

    @classmethod
    def load(cls, folder: str | Path, *, dtype: Any = None, mesh: Mesh | None = None, **options) -> LanguageGenerator:
        """The model and the tokenizer in a folder; `options` as above.

        Raises:
            DataError: no tokenizer. ConfigError, CheckpointError: see `from_pretrained`.
        """
        from mllm_jax.models.registry import from_pretrained

        tokenizer = ChatTokenizer.load(folder)  # first: what is missing should not have to wait for the weights
        module, params = from_pretrained(folder, dtype=dtype, mesh=mesh)
        return cls(module, params, tokenizer, mesh=mesh, **options)

    def encode(self, prompt: Prompt) -> list[int]:
        """The ids of a prompt.

        Raises:
            DataError: an empty prompt, ids that the model does not have, text without a tokenizer.
        """
        given = f"a prompt of type {type(prompt).__name__}"
        if len(prompt) == 0:
            raise DataError(f"an empty prompt, {prompt!r}", "at least one token", "give it a text")
        if isinstance(prompt, str) or isinstance(prompt[0], dict):
            if self.tokenizer is None:
                raise DataError(f"{given} for a model without a tokenizer", "ids", "pass a ChatTokenizer")
            ids = self.tokenizer.encode(prompt) if isinstance(prompt, str) else self.tokenizer.encode_chat(prompt)
        else:
            ids = [int(i) for i in prompt]
        if not ids or min(ids) < 0 or max(ids) >= self.config.vocab_size:
            strange = [i for i in ids if not 0 <= i < self.config.vocab_size]
            raise DataError(
                f"{given} of {len(ids)} ids, among them {strange[:5]}",
                f"ids from 0 to {self.config.vocab_size - 1}",
                "use the tokenizer that belongs to the model",
            )
        return ids

    def room(self, length: int, options: Options = Options()) -> int:
        """How many tokens may follow a prompt of `length`: max_new_tokens, or fewer where max_length is nearer.

        Raises:
            DataError: the prompt leaves no room.
        """
        if self.max_length is None:
            return options.max_new_tokens
        shared = self._answers.engine.steps.prompt_takes_room
        if length >= self.max_length + (not shared):
            raise DataError(
                f"a prompt of {length} tokens",
                f"at most {self.max_length - shared}, as the model takes {self.max_length}",
                "shorten the prompt, or raise max_length if the model can read more",
            )
        return min(options.max_new_tokens, self.max_length - length if shared else self.max_length)

    def generate(
        self, prompts: Sequence[Prompt], options: Options = Options(), sampling: Sampling = Sampling()
    ) -> list[Completion]:
        """The completions of the prompts, in their order.

        Raises:
            DataError: a prompt that is empty or too long; nothing has been computed then.
            ConfigError: options that contradict one another.
        """
        ids, limits = self._check(prompts, options, sampling)
        order = sorted(range(len(ids)), key=lambda i: len(ids[i]))  # like lengths share a bucket
        out: dict[int, Completion] = {}
        for start in range(0, len(order), self.batch_size):
            chunk = order[start : start + self.batch_size]
            request = self._request([limits[i] for i in chunk], chunk, options, sampling)
            completions = self._answers.complete(self._batch([ids[i] for i in chunk]), request)
            out |= zip(chunk, completions, strict=True)
        return [out[i] for i in range(len(ids))]

    def stream(
        self, prompt: Prompt, options: Options = Options(), sampling: Sampling = Sampling()
    ) -> Generator[str, None, Completion]:
        """Yields the answer's text piece by piece, whole characters only, and returns the completion.

        Raises:
            DataError, ConfigError: as `generate`; beam search knows its answer only at its end.
        """
        if options.num_beams > 1:
            raise ConfigError(f"a stream with num_beams={options.num_beams}", "num_beams=1", "use generate")
        ids, limits = self._check([prompt], options, sampling)
        pieces = self._answers.stream(self._batch(ids), self._request(limits, [0], options, sampling))
        while True:
            try:
                piece = next(pieces)[0]
            except StopIteration as end:
                return end.value[0]
            if piece:
                yield piece

    def _check(self, prompts, options: Options, sampling: Sampling) -> tuple[list[list[int]], list[int]]:
        options.check(sampling)
        if options.stop_strings and self.tokenizer is None:
            raise ConfigError("stop_strings for a model without a tokenizer", "stop_tokens", "pass a ChatTokenizer")
        ids = [self.encode(prompt) for prompt in prompts]
        return ids, [self.room(len(i), options) for i in ids]

    def _request(self, limits: list[int], indices: list[int], options: Options, sampling: Sampling) -> Request:
        own = getattr(self.config, "eos_token_id", None)
        own = () if own is None else (own,) if isinstance(own, int) else tuple(own)
        own += self.tokenizer.stop_ids if self.tokenizer else ()
        stops = options.stop_tokens + (() if options.ignore_eos else own)
        decode = self.tokenizer.decode if self.tokenizer else lambda ids: ""
        return Request(limits, indices, tuple(dict.fromkeys(stops)), decode, sampling, options)

    def _batch(self, ids: list[list[int]]) -> Batch:
        """Rows padded behind each prompt to a bucket, and to a power of two of them."""
        rows = min(self.batch_size, 1 << (len(ids) - 1).bit_length())
        tokens = np.zeros((rows, self._padded(max(map(len, ids)))), np.int32)
        segments = np.zeros_like(tokens)
        segments[:, 0] = 1  # a row without a prompt still has something to read
        for row, prompt in enumerate(ids):
            tokens[row, : len(prompt)], segments[row, : len(prompt)] = prompt, 1
        return {name: self._answers.engine.place(x) for name, x in (("tokens", tokens), ("segments", segments))}

    def _padded(self, length: int) -> int:
        return min(bucket(length), self.max_length or bucket(length))
