"""A generator of sounds from texts: a text encoder, a UNet of log-mel spectrograms, and a vocoder."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp

from mllm_jax.data.processing.mel_magnitudes import MelMagnitudes
from mllm_jax.generators.griffin_lim import GriffinLimConfig
from mllm_jax.generators.vocoder import VocoderConfig
from mllm_jax.layers.requirements import Requirements
from mllm_jax.models.text_to_image import TextToImage, TextToImageConfig


@dataclass(frozen=True)
class TextToSoundConfig(TextToImageConfig):
    """The parts of a generator of sounds, and its sampler.

    Its latents are log-mel spectrograms [T, M, 1], scaled so that `loudness` becomes [-1, 1], or those of an
    autoencoder of unscaled ones. The sounds of the training are as long as `unet.sample_size` says, (T, M).

    Attributes:
        vocoder: from spectrograms to samples: a trained one, or `GriffinLimConfig`.
        spectrogram: of the training's sounds, as the vocoder reads them.
        loudness: the least and the greatest value of spectrograms without an autoencoder.
    """

    vocoder: GriffinLimConfig | VocoderConfig = field(default=GriffinLimConfig(), kw_only=True)
    spectrogram: MelMagnitudes = field(default=MelMagnitudes(), kw_only=True)
    loudness: tuple[float, float] = field(default=(-11.5, 4.5), kw_only=True)

    modality = "audio"
    target_dtype = "float32"

    def __post_init__(self):
        super().__post_init__()
        require, spec, vocoder = Requirements("text-to-sound generator", self), self.spectrogram, self.vocoder
        require(self.image_size is None, f"image_size {self.image_size}", "None", "set unet.sample_size to (T, M)")
        own = (vocoder.num_mel_bins, math.prod(vocoder.rates), vocoder.rate)
        require(
            own == (spec.bins, spec.hop, spec.rate),
            "a vocoder of {} bins, {} samples a frame and {} a second".format(*own),
            f"{spec.bins}, {spec.hop} and {spec.rate}, as the spectrogram has",
            "change vocoder or spectrogram",
        )
        require(
            self.unet.height_and_width is not None and self.target_shape[1] == spec.bins,
            f"a UNet of sample_size {self.unet.sample_size}",
            f"(T, {spec.bins // self.factor}): frames and mel bins of the training's sounds",
            "change unet.sample_size",
        )
        require(self.loudness[0] < self.loudness[1], f"loudness {self.loudness}", "ascending", "change it")

    @property
    def parts(self) -> dict[str, Any]:
        """Each part's config by the name of its parameters."""
        trained = {} if isinstance(self.vocoder, GriffinLimConfig) else {"vocoder": self.vocoder}
        return super().parts | trained

    @property
    def image_channels(self) -> int:
        """The number of channels of a spectrogram."""
        return 1

    @property
    def frame(self) -> float:
        """Seconds of a frame of the spectrogram."""
        return self.spectrogram.hop / self.spectrogram.rate

    @property
    def target_shape(self) -> tuple[int, ...]:
        """The shape of the spectrograms of the training."""
        frames, bins = self.unet.height_and_width or (0, 0)
        return frames * self.factor, bins * self.factor

    def make(self) -> TextToSound:
        return TextToSound(self)


class TextToSound(TextToImage):
    """`TextToImage` with log-mel spectrograms float[B, T, M] in the place of images, which `decode` makes sound of."""

    config: TextToSoundConfig

    def setup(self):
        super().setup()
        self.vocoder = self.config.vocoder.make()  # Griffin-Lim is no part: it has no parameters

    def encode(self, spectrograms, noise=None) -> jax.Array:
        """Encodes spectrograms to latents, float32[B, t, m, C]; see `TextToImage.encode`."""
        least, most = self.config.loudness
        if self.vae is None:
            scaled = 2 * (spectrograms[..., None] - least) / (most - least) - 1
            return jnp.clip(scaled, -1, 1).astype(jnp.float32)
        return self._sampled(self.vae.encode(spectrograms[..., None]), noise)

    def latents_of(self, targets) -> jax.Array:
        return self.encode(targets)

    def decode(self, latents) -> jax.Array:
        """Decodes latents to sounds, float32[B, samples] in [-1, 1]."""
        least, most = self.config.loudness
        if self.vae is None:
            spectrograms = least + (jnp.clip(latents, -1, 1) + 1) * (most - least) / 2
        else:
            spectrograms = self.vae.decode(self.config.vae.unscaled(latents))
        return jnp.clip(self.vocoder(spectrograms[..., 0]).astype(jnp.float32), -1, 1)
