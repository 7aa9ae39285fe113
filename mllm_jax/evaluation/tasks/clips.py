"""The tasks on held-out clips: naming sounds, transcribing speech, and questions about videos, with their controls."""

from __future__ import annotations

from collections.abc import Sequence

from mllm_jax.data.message import Example, Message
from mllm_jax.datasets.arcade_sprites import HELD_OUT, QUESTIONS, ArcadeSprites
from mllm_jax.datasets.asterisk_speech import AsteriskSpeech
from mllm_jax.datasets.foxdot_sounds import FoxDotSounds
from mllm_jax.evaluation.metrics import ShuffledMedia, count, references
from mllm_jax.evaluation.task import Task
from mllm_jax.evaluation.tasks.openmoji import METRICS
from mllm_jax.generation.options import Answer


def ask(example: Example) -> tuple[Message, ...]:
    """Returns the example without its last answer."""
    return example.messages[:-1]


def word_error_rate(answers: Sequence[Answer], examples: Sequence[Example]) -> float:
    """Returns the word error rate of transcriptions; see `mllm_jax.evaluation.metrics.wer`."""
    from mllm_jax.evaluation.metrics import wer

    return wer([answer.text for answer in answers], [references(example)[0] for example in examples])


def foxdot_task(folder: str | None = None) -> Task:
    """Returns the task of naming a sound: the share of answers that are its class's description.

    Args:
        folder: see `mllm_jax.FoxDotSounds`.
    """
    return Task("held_out/sound", FoxDotSounds("held_out", folder), ask, METRICS)


def asterisk_task(folder: str | None = None, max_seconds: float = 30.0) -> Task:
    """Returns the task of transcribing speech.

    Args:
        folder, max_seconds: see `mllm_jax.AsteriskSpeech`.
    """
    source = AsteriskSpeech("held_out", folder, max_seconds)
    metrics = {"wer": word_error_rate, "wer_shuffled_media": ShuffledMedia(word_error_rate), "n": count}
    return Task("held_out/speech", source, ask, metrics, max_new_tokens=128)


def arcade_tasks(limit: int = 20 * len(HELD_OUT), **settings) -> tuple[Task, ...]:
    """Returns a task for each question about videos: the character, the action, and both.

    Args:
        limit: number of videos.
        settings: folder, frames, fps, image_size and seed of `mllm_jax.ArcadeSprites`.
    """
    return tuple(
        Task(f"held_out/{kind}", ArcadeSprites("held_out", size=limit, questions=(kind,), **settings), ask, METRICS)
        for kind in QUESTIONS
    )
