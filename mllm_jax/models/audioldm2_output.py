"""AudioLDM-2 as the generator of an output branch, with two conditions of fixed size (arXiv 2308.05734).

    captions -> CLAP, Flan-T5, GPT-2 -> 8 vectors, and Flan-T5's states repeated to `text_vectors`
    output projector -> the same two (see `mllm_jax.output_projectors.several`) -> UNet -> autoencoder -> vocoder

Its parameters are those of `AudioLDM2`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from typing import Any

import jax
import jax.numpy as jnp

from mllm_jax.data.processing.captions import Captions, JoinedCaptions
from mllm_jax.data.processing.mel_magnitudes import MelMagnitudes
from mllm_jax.layers.requirements import Requirements
from mllm_jax.models.audioldm2 import VECTORS, AudioLDM2, AudioLDM2Config, SoundTexts
from mllm_jax.output_projectors.several import fill_positions


@dataclass(frozen=True)
class AudioLDM2OutputConfig(AudioLDM2Config):
    """The parts of an AudioLDM-2, and how captions and sounds of the training are laid out.

    Attributes:
        caption_ids: of CLAP's and of Flan-T5's tokens of a caption, padding included.
        text_vectors: vectors of the second condition.
        seconds: of the sounds of the training.
    """

    caption_ids: tuple[int, int] = field(default=(64, 64), kw_only=True)
    text_vectors: int = field(default=32, kw_only=True)
    seconds: float = field(default=10.24, kw_only=True)

    target_dtype = "float32"
    tokenizers = ("tokenizer", "tokenizer_2")

    def __post_init__(self):
        super().__post_init__()
        require = Requirements("AudioLDM-2's output branch", self)
        most = self.text_encoder.max_length, self.longest
        require(
            all(1 <= own <= limit for own, limit in zip(self.caption_ids, most, strict=True)),
            f"caption_ids {self.caption_ids}",
            f"at least 1, and at most {most[0]} and {most[1]}, which the text encoders read",
            "change caption_ids",
        )
        require(
            self.text_vectors >= 1 and self.target_shape[0] >= self.factor,
            f"text_vectors {self.text_vectors}, seconds {self.seconds}",
            f"at least one vector, and {self.frame * self.factor:g} seconds",
            "change them",
        )

    @classmethod
    def of(cls, config: AudioLDM2Config, **options: Any) -> AudioLDM2OutputConfig:
        """Returns the config for an AudioLDM-2, such as that of a folder."""
        return cls(**{each.name: getattr(config, each.name) for each in fields(AudioLDM2Config)}, **options)

    @property
    def spectrogram(self) -> MelMagnitudes:
        """The spectrogram that the autoencoder and the vocoder read."""
        hop = math.prod(self.vocoder.rates)
        return MelMagnitudes(rate=self.vocoder.rate, hop=hop, bins=self.vocoder.num_mel_bins)

    @property
    def target_shape(self) -> tuple[int, int]:
        """The shape of the spectrograms of the training."""
        frames = round(self.seconds / self.frame / self.factor) * self.factor
        return frames, self.vocoder.num_mel_bins

    @property
    def caption_length(self) -> int:
        """The number of ids of a caption in a batch."""
        return sum(self.caption_ids)

    @property
    def condition_tokens(self) -> tuple[int, int]:
        """The number of vectors of each condition."""
        return VECTORS, self.text_vectors

    @property
    def condition_size(self) -> tuple[int, int]:
        """The width of each condition's vectors."""
        return self.language_model.hidden_size, self.text_encoder_2.hidden_size

    def captions(self, tokenizers: Sequence[Any]) -> JoinedCaptions:
        """Returns the conversion of captions, by tokenizers in the order of `tokenizers`."""
        pairs = zip(tokenizers, self.caption_ids, strict=True)
        return JoinedCaptions(tuple(Captions.of(words, length) for words, length in pairs))

    def make(self) -> AudioLDM2Output:
        return AudioLDM2Output(self)


class AudioLDM2Output(AudioLDM2):
    """`AudioLDM2` with captions as one array of ids, and conditions without masks."""

    config: AudioLDM2OutputConfig

    def condition(self, captions) -> tuple[jax.Array, jax.Array]:
        """Encodes captions of int[B, caption_length] ids.

        Returns:
            dtype[B, 8, E] and dtype[B, text_vectors, F].
        """
        c = self.config
        clap, t5 = jnp.split(captions, [c.caption_ids[0]], axis=1)
        pairs = (clap, c.text_encoder.pad_token_id), (t5, c.text_encoder_2.t5.pad_token_id or 0)
        masks = [(ids != padding).astype(jnp.int32) for ids, padding in pairs]
        if self.is_initializing():
            self.language_model(t5)
        vectors, states, mask = super().condition(SoundTexts(clap, masks[0], t5, masks[1], masks[1].sum(axis=1)))
        return vectors, fill_positions(states, mask.astype(bool), c.text_vectors)

    def denoise(self, latents, timesteps, text) -> jax.Array:
        """Predicts as `AudioLDM2.denoise`, from two conditions that count whole."""
        vectors, states = text
        return self.unet(latents, timesteps, vectors, states, None, None)

    def latents_of(self, targets) -> jax.Array:
        """Returns the latents float32[B, t, m, C] of log-mel spectrograms float[B, T, M]: their distributions' mean."""
        mean, _ = self.vae.encode(targets[..., None])
        return self.config.vae.scaled(mean.astype(jnp.float32))
