"""Tasks about toys, in a separate module, so that a run that names it finds it again."""

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
    """Returns the conversation without its last answer."""
    return example.messages[:-1]


def colours(name: str, source, *, size: int = 8, **options) -> Task:
    """Returns a task of questions about images of noise from a source of toys; without media it has no controls."""
    metrics = METRICS if source.images else {"accuracy": accuracy, "n": count}
    return Task(name, replace(source, size=size), ask, metrics, **options)
