"""Answers to a processor's batch: `mllm_jax.generate`."""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache
from typing import Any

import numpy as np
from flax import linen as nn
from jax.sharding import Mesh

from mllm_jax.data.batch import SEQ
from mllm_jax.generation.assistant import Assistant
from mllm_jax.generation.engine import Engine
from mllm_jax.generation.options import Answer, read_options
from mllm_jax.generation.program import Program
from mllm_jax.models.processor import Processor


def generate(
    model: nn.Module,
    params: dict,
    batch: Mapping[str, np.ndarray],
    processor: Processor,
    *,
    mesh: Mesh | None = None,
    **options: Any,
) -> list[str]:
    """Generates the text that follows each row of a batch.

    Args:
        model, params: from `from_pretrained`.
        batch: the processor's output for texts and media.
        processor: its tokenizer decodes the answers.
        mesh: the mesh over which params are sharded, or None.
        options: see `Assistant.generate`.

    Raises:
        DataError: the batch leaves no room for an answer, or has an array that the model's spec lacks.
        ConfigError: options contradict one another, or do not exist.
    """
    return [answer.text for answer in complete(model, params, batch, processor, mesh=mesh, **options)]


def complete(
    model: nn.Module,
    params: dict,
    batch: Mapping[str, np.ndarray],
    processor: Processor,
    *,
    mesh: Mesh | None = None,
    max_length: int | None = None,
    **options: Any,
) -> list[Answer]:
    """Does what `generate` does, and returns `Answer`s."""
    how, sampling = read_options(options)
    how.check(sampling)
    assistant = Assistant(model, params, processor, mesh=mesh, max_length=max_length)
    count, length = np.asarray(batch["tokens"]).shape
    limit = assistant.room(int((np.asarray(batch["segments"]) > 0).sum(axis=1).max()), how)
    spec = assistant.processor.declared(batch)
    spec.check(batch)

    def padded(_, rows: int, wanted: int) -> dict[str, np.ndarray]:
        """Pads the batch's texts to a bucket, so that several lengths share a compiled function."""
        arrays = {name: np.asarray(array) for name, array in batch.items() if name != "loss_weights"}
        for name, array in arrays.items():
            if SEQ in spec[name].axes and array.shape[1] == length:
                more = [(0, 0), (0, wanted - length)] + [(0, 0)] * (array.ndim - 2)
                arrays[name] = np.pad(array, more, constant_values=spec[name].fill)
        return arrays

    longest = assistant.max_length and max(assistant.max_length, length)
    engine = Engine(_program(model, mesh).of(params), padded, count, longest)
    return engine.answer(assistant.request(row, length, limit, row, how, sampling) for row in range(count))


@lru_cache(maxsize=8)
def _program(model: nn.Module, mesh: Mesh | None) -> Program:
    """Returns a model's compiled functions without parameters, so that later calls do not compile again."""
    return Program(model, None, mesh)
