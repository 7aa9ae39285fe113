"""Drawing of sounds: prompts and negative prompts to samples."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
from flax import linen as nn
from jax.sharding import Mesh

from mllm_jax.data.chat_tokenizer import ChatTokenizer
from mllm_jax.data.processing.captions import Captions
from mllm_jax.errors import ConfigError, DataError
from mllm_jax.generation.draw import TOKENIZER, Drawer, Drawing, ids_of
from mllm_jax.generation.media import Media
from mllm_jax.generation.options import Answer
from mllm_jax.generation.program import bucket
from mllm_jax.models.audioldm2 import AudioLDM2Config, SoundTexts
from mllm_jax.models.registry import from_pretrained
from mllm_jax.models.text_to_sound import TextToSoundConfig

TOKENIZER_2 = f"{TOKENIZER}_2"
LEAST = 8  # tokens of a padded text


class SoundDrawer(Drawer):
    """A model that draws sounds, with the conversion of its texts; the arguments are those of `Drawer`."""

    made, axes = "sounds", ("time", "mel bands")
    refused = ("frames", "height", "width", "start_image")

    @property
    def config(self) -> TextToSoundConfig:
        return self.model.config

    # ---- inside

    def _start_and_size(self, how: Drawing, images: int) -> tuple[None, tuple[int, int]]:
        """Returns no start, and frames and mel bins."""
        c, bins = self.config, self.config.vocoder.num_mel_bins
        frames = None if how.latents is None else np.shape(how.latents)[-3] * self.factor
        if how.seconds is None and frames is not None:
            return None, (frames, bins)
        seconds = self._seconds(how)
        if not math.isfinite(seconds) or seconds < c.frame * self.factor:
            raise ConfigError(
                f"seconds={seconds}", f"a number from {c.frame * self.factor:g}", "give the length of the sound"
            )
        asked = math.ceil(self._frames(seconds) / self.factor) * self.factor
        if frames not in (None, asked):
            raise ConfigError(
                f"seconds={seconds} beside latents of {frames * c.frame:g} seconds",
                "latents alone, or of that length",
                "drop seconds",
            )
        return None, (asked, bins)

    def _frames(self, seconds: float) -> int:
        """Returns the number of mel frames that hold a sound."""
        return math.ceil(seconds / self.config.frame - 1e-6)

    def _seconds(self, how: Drawing) -> float:
        """Returns the length that is asked for, or that of the model's training."""
        return self.config.target_shape[0] * self.config.frame if how.seconds is None else how.seconds

    def _size_shown(self, how: Drawing, height: int, width: int) -> dict[str, str]:
        return dict(seconds=f"{height * self.config.frame if how.seconds is None else how.seconds:g}")

    def _answer(self, made: np.ndarray, how: Drawing, metadata: dict[str, str]) -> Answer:
        rate = self.config.vocoder.rate
        if how.seconds is None and how.latents is not None:
            samples = np.shape(how.latents)[-3] * self.factor * math.prod(self.config.vocoder.rates)
        else:
            samples = int(self._seconds(how) * rate)
        return Answer("<audio 1>", (), media=(Media("audio", made[:samples], float(rate), metadata),))


class AudioLDM2Drawer(SoundDrawer):
    """An AudioLDM-2, with its tokenizers.

    A sound is the same alone and in any batch. It equals that of diffusers' pipeline for its prompt alone: in a batch,
    diffusers' language model also counts the padding of shorter prompts.

    Args:
        model, params: from `mllm_jax.from_pretrained` of an AudioLDM-2.
        tokenizer, tokenizer_2: CLAP's and Flan-T5's.
        mesh: over which params are sharded, or None.
    """

    def __init__(
        self,
        model: nn.Module,
        params: dict | None,
        tokenizer: ChatTokenizer,
        tokenizer_2: ChatTokenizer,
        *,
        mesh: Mesh | None = None,
    ):
        c = model.config
        # CLAP's and Flan-T5's texts, each with the size of the encoder's vocabulary.
        self._read = (
            (Captions.of(tokenizer, c.text_encoder.max_length), c.text_encoder.vocab_size),
            (Captions.of(tokenizer_2, c.longest), c.text_encoder_2.vocab_size),
        )
        super().__init__(model, params, self._read[0][0], mesh=mesh)
        if tokenizer_2.pad_token_id is None:
            raise DataError(
                "a second tokenizer without a padding token", "Flan-T5's tokenizer", "restore the folder's tokenizer_2"
            )

    @classmethod
    def load(cls, folder: str | Path, *, mesh: Mesh | None = None, dtype: Any = None) -> AudioLDM2Drawer:
        """Loads a folder. Raises as `mllm_jax.from_pretrained`; DataError: a tokenizer is missing."""
        tokenizers = [ChatTokenizer.load(Path(folder) / name) for name in (TOKENIZER, TOKENIZER_2)]
        model, params = from_pretrained(folder, dtype=dtype, mesh=mesh)
        return cls(model, params, *tokenizers, mesh=mesh)

    @property
    def config(self) -> AudioLDM2Config:
        return self.model.config

    # ---- inside

    def _frames(self, seconds: float) -> int:
        """Returns the number of whole mel frames in a sound, as diffusers does."""
        return int(seconds / self.config.frame)

    def _encoded(self, texts: list[str], negatives: list[str] | None) -> tuple[SoundTexts, SoundTexts | None]:
        both = [texts] if negatives is None else [texts, negatives]
        clap, t5 = ([[ids_of(text, *read) for text in each] for each in both] for read in self._read)
        lengths = [len(ids) for ids in t5[0]]
        # A negative text is cut to the length of the text, as in diffusers.
        t5[1:] = [[i if len(i) <= n else i[: n - 1] + i[-1:] for i, n in zip(e, lengths, strict=True)] for e in t5[1:]]
        found = []
        for first, second in zip(clap, t5, strict=True):
            longest = max(len(ids) for each in clap for ids in each)
            padded = _padded(first, longest, self._read[0][0].words.pad_token_id)
            padded_2 = _padded(second, max(lengths), self._read[1][0].words.pad_token_id)
            found.append(SoundTexts(*padded, *padded_2, np.array(lengths, np.int32)))
        return found[0], found[1] if negatives is not None else None


def _padded(texts: list[list[int]], longest: int, padding: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns int32[B, L] ids and int32[B, L], 0 at padding, where L is one of few lengths."""
    size = bucket(longest, least=LEAST)
    ids = [text + [padding] * (size - len(text)) for text in texts]
    mask = [[1] * len(text) + [0] * (size - len(text)) for text in texts]
    return np.array(ids, np.int32), np.array(mask, np.int32)
