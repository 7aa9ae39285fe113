"""The tasks on held-out clips: naming sounds, transcribing speech, and questions about videos, with their controls."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from mllm_jax.data.message import Example, Message
from mllm_jax.datasets.arcade_sprites import HELD_OUT, QUESTIONS, ArcadeSprites
from mllm_jax.datasets.asterisk_speech import AsteriskSpeech
from mllm_jax.datasets.foxdot_sounds import FoxDotSounds
from mllm_jax.evaluation.metrics import ShuffledMedia, count
from mllm_jax.evaluation.task import Task
from mllm_jax.evaluation.tasks.openmoji import METRICS


def ask(example: Example) -> tuple[Message, ...]:
    """Returns the example without its last answer."""
    return example.messages[:-1]


def foxdot_task(folder: str | None = None) -> Task:
    """Returns the task of naming a sound: the share of answers that are its class's description.

    Args:
        folder: see `mllm_jax.FoxDotSounds`.
    """
    return Task("held_out/sound", FoxDotSounds("held_out", folder), ask, METRICS)


def asterisk_task(
    folder: str | None = None, max_seconds: float = 30.0, normalise: Callable[[str], str] | None = None
) -> Task:
    """Returns the task of transcribing Asterisk's held-out prompts.

    Args:
        folder, max_seconds: see `mllm_jax.AsteriskSpeech`.
        normalise: see `speech_task`.
    """
    return speech_task(AsteriskSpeech("held_out", folder, max_seconds), normalise)


def speech_task(
    source: Any,
    normalise: Callable[[str], str] | None = None,
    *,
    name: str = "held_out/speech",
    max_new_tokens: int = 128,
) -> Task:
    """Returns the task of transcribing speech: the word error rate.

    Args:
        source: held-out recordings with their texts, such as `mllm_jax.SpeechRecords`.
        normalise: applied to answers and texts, such as an `EnglishNormalizer`; None: `normalise` of the metrics.
        name, max_new_tokens: see `Task`.
    """
    from mllm_jax.evaluation.metrics import ErrorRate

    error_rate = ErrorRate() if normalise is None else ErrorRate(normalise=normalise)
    metrics = {"wer": error_rate, "wer_shuffled_media": ShuffledMedia(error_rate), "n": count}
    return Task(name, source, ask, metrics, max_new_tokens=max_new_tokens)


def arcade_tasks(
    limit: int = 20 * len(HELD_OUT), questions: tuple[str, ...] = tuple(QUESTIONS), **settings
) -> tuple[Task, ...]:
    """Returns a task for each question about videos: the character, the action, and both.

    Args:
        limit: number of videos.
        questions: "character", "action" or "both".
        settings: folder, frames, fps, image_size and seed of `mllm_jax.ArcadeSprites`.
    """
    return tuple(
        Task(f"held_out/{kind}", ArcadeSprites("held_out", size=limit, questions=(kind,), **settings), ask, METRICS)
        for kind in questions
    )
