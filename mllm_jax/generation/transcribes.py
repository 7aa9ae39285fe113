"""The part of the Assistant that writes down speech."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from flax import linen as nn

from mllm_jax.data.audio import Source
from mllm_jax.generation.speech_options import TEMPERATURES
from mllm_jax.generation.transcribe import Transcriber, no_speech
from mllm_jax.generation.transcript import Transcript


class Transcribes:
    """The call `transcribe`, with the transcriber that `Assistant` has for a Whisper."""

    model: nn.Module
    _transcriber: Transcriber | None

    def transcribe(
        self,
        audio: Source | list[Source],
        language: str | None = None,
        task: str = "transcribe",
        timestamps: str | None = None,
        beams: int = 1,
        temperatures: Sequence[float] = TEMPERATURES,
        batch_size: int = 8,
        *,
        on_segment: Callable[..., Any] | None = None,
        on_progress: Callable[[float], Any] | None = None,
        **options: Any,
    ) -> Transcript | list[Transcript]:
        """Writes down the speech of a recording of any length, or of a list of recordings.

        Args:
            audio: a path, the bytes of a file, or (samples float[n], rate); a list gives a list.
            language: name or code; None: detected.
            task: "transcribe", or "translate" into English.
            timestamps: None, "segment" or "word".
            beams, temperatures: of the attempts at a text; the next one is made if a text fails a test.
            batch_size: number of recordings that are transcribed together.
            on_segment: called with each segment when it is found; for a list, with the recording's position first.
            on_progress: called with the number of seconds that are done, of all recordings.
            options: the other fields of `SpeechOptions`.

        Raises:
            DataError: a recording cannot be read.
            ConfigError: the model writes down no speech, or does not have the language, the task or the timestamps;
                options do not exist.
        """
        if self._transcriber is None:
            raise no_speech(self.model.config)
        options |= dict(language=language, task=task, timestamps=timestamps, beams=beams)
        options |= dict(temperatures=temperatures, batch_size=batch_size)
        return self._transcriber.transcribe(audio, on_segment, on_progress, **options)
