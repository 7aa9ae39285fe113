"""Sounds of composed models: pieces of bounded length, each in one slot, with the media tokens of its valid part."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from mllm_jax.data.audio import as_audio, audio_length
from mllm_jax.data.message import Audio
from mllm_jax.data.processing.audio import AudioProcessor
from mllm_jax.data.processing.media import Lazy, PreparedMedia
from mllm_jax.errors import DataError

ARRAYS = SOUNDS, MASKS = "audio_sounds", "audio_masks"  # in a batch


@dataclass(frozen=True)
class SoundTokens:
    """The conversion of a sound of any length to media tokens.

    Attributes:
        processor: makes the encoder's inputs and their masks.
        samples: of the longest sound in one slot; a longer one takes several.
        inputs: shape of the encoder's input for one slot; steps in time are its last axis.
        length: valid steps of the encoder's input -> media tokens.
    """

    processor: AudioProcessor
    samples: int
    inputs: tuple[int, ...]
    length: Callable[[int], int]

    unit = "piece"

    @property
    def tokens(self) -> int:
        """The number of media tokens of a full slot."""
        return int(self.length(self.inputs[-1]))

    @property
    def blank(self) -> Mapping[str, np.ndarray]:
        return dict(zip(ARRAYS, (np.zeros(self.inputs, np.float32), np.zeros(self.inputs[-1:], np.int32)), strict=True))

    def fingerprint(self) -> str:
        return repr([self.processor, self.samples, self.inputs, self.tokens])

    def media(self, part: Audio, token: int) -> PreparedMedia:
        """Returns a sound, which is decoded when its arrays are read; its media tokens depend on its length alone.

        Args:
            token: the id at the positions of media tokens.

        Raises:
            DataError: see `audio_length`; or a sound too short for one media token.
        """
        rate = self.processor.rate
        total = audio_length(part, rate)
        pieces = [(start, min(total - start, self.samples)) for start in range(0, total, self.samples)]
        counted = [(start, size, self._count(size)) for start, size in pieces]
        kept = [(start, size, count) for start, size, count in counted if count > 0]  # the end may be too short for one
        if not kept:
            raise DataError(f"a sound of {total / rate:.3f} s", "enough for one media token", "give a longer one")
        places = [slot * self.tokens + np.arange(count) for slot, (_, _, count) in enumerate(kept)]

        def read(name: str) -> np.ndarray:
            if name == MASKS:
                valid = [[self.processor.steps(size)] for _, size, _ in kept]
                return (np.arange(self.inputs[-1]) < np.asarray(valid)).astype(np.int32)
            samples = as_audio(part, rate)
            return self._inputs([samples[start : start + size] for start, size, _ in kept])

        ids = np.full(sum(map(len, places)), token)
        return PreparedMedia(Lazy(ARRAYS, read), ids, np.concatenate(places), count=len(kept), modality="audio")

    def _count(self, samples: int) -> int:
        return int(self.length(self.processor.steps(samples)))

    def _inputs(self, pieces: Sequence[np.ndarray]) -> np.ndarray:
        """Returns the encoder's inputs of some pieces, in the shape of a slot."""
        steps = self.inputs[-1]
        made = self.processor(pieces)[self.processor.name][..., :steps]
        return np.pad(made, [(0, 0)] * (made.ndim - 1) + [(0, steps - made.shape[-1])])
