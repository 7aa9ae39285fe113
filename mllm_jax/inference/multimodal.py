"""Answers of a composed model to batches that its processor made."""

from __future__ import annotations

from collections.abc import Generator, Mapping
from functools import lru_cache

import jax
import numpy as np
from jax.sharding import Mesh

from mllm_jax.errors import DataError
from mllm_jax.inference.answers import Answers, Request
from mllm_jax.inference.engine import Engine, bucket
from mllm_jax.inference.options import Completion, Options, longest_text
from mllm_jax.inference.sampling import Sampling
from mllm_jax.models.multimodal import Multimodal
from mllm_jax.models.processor import Processor


def generate(
    model: Multimodal,
    params: dict,
    batch: Mapping[str, np.ndarray],
    processor: Processor,
    options: Options = Options(),
    sampling: Sampling = Sampling(),
    *,
    mesh: Mesh | None = None,
) -> list[str]:
    """The texts that follow each row of a batch.

    Args:
        model, params: as `from_pretrained` gives them.
        batch: what the processor made of texts and pictures.
        processor: whose tokenizer writes the answers.
        mesh: what params are sharded over, if over anything.

    Raises:
        DataError: a batch that leaves no room for an answer.
        ConfigError: options that contradict one another.
    """
    generator = MultimodalGenerator(model, params, processor, mesh=mesh)
    return [completion.text for completion in generator.complete(batch, options, sampling)]


class MultimodalGenerator:
    """Continues batches, many batches one after the other.

    In float32 a row gets the same tokens alone and in any company. A sampled answer is drawn by the seed and the row.

    Args:
        model, params, processor, mesh: as `generate` takes them.
        max_length: tokens of a prompt and its answer together; None is the LLM's `max_position_embeddings`.
    """

    def __init__(
        self,
        model: Multimodal,
        params: dict,
        processor: Processor,
        *,
        mesh: Mesh | None = None,
        max_length: int | None = None,
    ):
        self.config, self.processor = model.config, processor
        self.max_length = longest_text(model.config.llm, max_length)
        self._answers = Answers(_engine(model, mesh).of(params))

    def complete(
        self, batch: Mapping[str, np.ndarray], options: Options = Options(), sampling: Sampling = Sampling()
    ) -> list[Completion]:
        """The completions of the rows; raises what `generate` does."""
        options.check(sampling)
        return self._answers.complete(self._padded(batch), self._request(batch, options, sampling))

    def stream(
        self, batch: Mapping[str, np.ndarray], options: Options = Options(), sampling: Sampling = Sampling()
    ) -> Generator[list[str], None, list[Completion]]:
        """Yields what each row's text gains, piece by piece; returns the completions."""
        options.check(sampling)
        return self._answers.stream(self._padded(batch), self._request(batch, options, sampling))

    def _request(self, batch: Mapping[str, np.ndarray], options: Options, sampling: Sampling) -> Request:
        lengths = (np.asarray(batch["segments"]) > 0).sum(axis=1)
        limit = options.max_new_tokens
        if self.max_length is not None and self._answers.engine.steps.prompt_takes_room:
            limit = min(limit, self.max_length - int(lengths.max()))
            if limit < 1:
                raise DataError(
                    f"a text of {lengths.max()} tokens, media included",
                    f"at most {self.max_length - 1}, as the model takes {self.max_length}",
                    "shorten the text or give it fewer pictures",
                )
        own = getattr(self.config.llm, "eos_token_id", None)
        own = () if own is None else (own,) if isinstance(own, int) else tuple(own)
        own += self.processor.tokenizer.stop_ids
        stops = options.stop_tokens + (() if options.ignore_eos else own)
        count = len(lengths)
        return Request(
            limits=[limit] * count,
            indices=list(range(count)),
            stops=tuple(dict.fromkeys(stops)),
            decode=self.processor.decode,
            sampling=sampling,
            options=options,
        )

    def _padded(self, batch: Mapping[str, np.ndarray]) -> dict[str, jax.Array]:
        """The batch on the devices, its texts padded to a bucket so that lengths compile once for several."""
        length = np.asarray(batch["tokens"]).shape[1]
        more = bucket(length) - length
        if self.max_length is not None:
            more = max(min(more, self.max_length - length), 0)
        fill = dict(tokens=0, segments=0, positions=0, media_index=-1, media_weights=0)
        padded = {}
        for name, array in batch.items():
            array = np.asarray(array)
            if name in fill:
                pads = [(0, 0), (0, more)] + [(0, 0)] * (array.ndim - 2)
                array = np.pad(array, pads, constant_values=fill[name])
            if name != "loss_weights":
                padded[name] = self._answers.engine.place(array)
        return padded


@lru_cache(maxsize=8)
def _engine(model: Multimodal, mesh: Mesh | None) -> Engine:
    """What is compiled for a model, without parameters, so that calls one after the other compile once."""
    return Engine(model, None, mesh)
