"""Tasks about toys: a module of its own, so that a run that names it finds it again."""

from __future__ import annotations

from dataclasses import replace

from mllm_jax import Task
from mllm_jax.evaluation.metrics import ShuffledMedia, accuracy, count, majority

METRICS = {
    "accuracy": accuracy,
    "accuracy_shuffled_media": ShuffledMedia(accuracy),
    "majority": majority,
    "n": count,
}


def ask(example):
    """The conversation without its last answer."""
    return example.messages[:-1]


def colours(name: str, source, *, size: int = 8, **options) -> Task:
    """Questions about images of noise, of a source of toys; without media there are no controls."""
    metrics = METRICS if source.pictures else {"accuracy": accuracy, "n": count}
    return Task(name, replace(source, size=size), ask, metrics, **options)
