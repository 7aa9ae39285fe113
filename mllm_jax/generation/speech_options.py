"""The options of a transcription, and the tests that a text must pass."""

from __future__ import annotations

import math
import zlib
from collections.abc import Sequence
from dataclasses import dataclass

from mllm_jax.errors import ConfigError

TEMPERATURES = (0.0, 0.2, 0.4, 0.6, 0.8, 1.0)


@dataclass(frozen=True)
class Attempt:
    """A text of a window.

    Attributes:
        tokens: with the end, if it was reached.
        logprob: mean log probability of a token.
    """

    tokens: tuple[int, ...]
    logprob: float
    temperature: float


@dataclass(frozen=True)
class SpeechOptions:
    """The options of a transcription.

    A text is written again at the next temperature if it repeats itself or is improbable, except where there is no
    speech: such a window has no text. The thresholds are those of transformers' examples; None is no test.

    Attributes:
        language: name or code; None: detected in the first window of each recording.
        task: "transcribe", or "translate" into English.
        timestamps: None: only recordings that are longer than a window have times in their texts, and segments.
            "segment": all have. "word": also the times of words.
        beams: of beam search, at temperature 0.
        temperatures: of the attempts.
        batch_size: recordings that are transcribed together.
        prompt: a text that precedes the recording, for its spelling and names.
        condition_on_previous: each window's prompt begins with the text before it.
        compression_ratio: the largest ratio by which zlib shortens the tokens of a text.
        logprob: the least mean log probability of a token.
        no_speech: the probability of no speech from which an improbable text is left out.
        voice_activity: pass over silence, by the energy of the sound.
        seed: of attempts at temperatures above 0.
    """

    language: str | None = None
    task: str = "transcribe"
    timestamps: str | None = None
    beams: int = 1
    temperatures: tuple[float, ...] = TEMPERATURES
    batch_size: int = 8
    prompt: str | None = None
    condition_on_previous: bool = False
    compression_ratio: float | None = 1.35
    logprob: float | None = -1.0
    no_speech: float | None = 0.6
    voice_activity: bool = False
    seed: int = 0

    def __post_init__(self):
        object.__setattr__(self, "temperatures", tuple(self.temperatures))
        right = self.temperatures and all(0 <= temperature < math.inf for temperature in self.temperatures)
        if not right or self.beams < 1 or self.batch_size < 1:
            raise ConfigError(
                f"temperatures={self.temperatures}, beams={self.beams}, batch_size={self.batch_size}",
                "one or more temperatures from 0, beams and batch_size from 1",
                "change the option",
            )

    def fails(self, attempt: Attempt, silence: float | None, vocab_size: int) -> bool:
        """Returns whether a text must be written again."""
        if self.is_silent(attempt, silence):
            return False
        ratio = compression_ratio(attempt.tokens, vocab_size)
        repeats = self.compression_ratio is not None and ratio > self.compression_ratio
        return repeats or self._is_improbable(attempt)

    def is_silent(self, attempt: Attempt, silence: float | None) -> bool:
        """Returns whether a window has no speech.

        Args:
            silence: the probability of that, or None.
        """
        if silence is None or self.no_speech is None:
            return False
        return silence > self.no_speech and self._is_improbable(attempt)

    def _is_improbable(self, attempt: Attempt) -> bool:
        return self.logprob is not None and attempt.logprob < self.logprob


def compression_ratio(tokens: Sequence[int], vocab_size: int) -> float:
    """Returns how much zlib shortens the tokens as bytes: a text that repeats itself has a high ratio."""
    width = int(math.log2(vocab_size) / 8) + 1
    content = b"".join(int(token).to_bytes(width, "little") for token in tokens)
    return len(content) / len(zlib.compress(content))
