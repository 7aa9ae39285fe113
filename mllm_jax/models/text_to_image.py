"""A generator of images from texts: a text encoder, a UNet, and an autoencoder or none (arXiv 2112.10752).

Stable Diffusion is one (`mllm_jax.models.stable_diffusion`), and a small one can be trained from scratch. Inside a
multimodal model it is the part `generator_image`, whose patterns then read `generator_image/unet/*`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import linen as nn

from mllm_jax.data.processing.captions import Captions
from mllm_jax.encoders.text_encoder import TextTowerConfig
from mllm_jax.generators.unet import UNetConfig
from mllm_jax.generators.vae import AutoencoderKLConfig
from mllm_jax.layers.compute import WithCompute, within
from mllm_jax.layers.requirements import Requirements


@dataclass(frozen=True)
class TextToImageConfig(WithCompute):
    """The parts of a generator of images, and its sampler.

    Attributes:
        text_encoder: its last hidden states are the condition.
        unet: predicts noise, or what `scheduler.prediction_type` names, from noised latents.
        vae: None: the latents are the pixels, scaled to [-1, 1].
        scheduler: the noise of training and the sampler, see `mllm_jax.generators.schedulers`.
        image_size: side of the images of the training; None: that of the UNet's latents. It draws others too.
    """

    text_encoder: TextTowerConfig
    unet: UNetConfig
    vae: AutoencoderKLConfig | None
    scheduler: Any
    image_size: int | None = None

    family = None
    modality = "image"  # of what it draws
    rate: ClassVar[float | None] = None  # frames a second of a video
    target_dtype = "uint8"
    tokenizers = ("",)  # subfolders of `Output.tokenizer`

    def __post_init__(self):
        require = Requirements("text-to-image generator", self)
        latents = self.image_channels if self.vae is None else self.vae.latent_channels
        require(
            self.unet.in_channels == self.unet.out_channels == latents,
            f"a UNet from {self.unet.in_channels} to {self.unet.out_channels} channels and latents of {latents}",
            "equal numbers; a UNet for inpainting reads more channels",
            "change unet or vae",
        )
        require(
            self.unet.text_widths == (self.condition_size,),
            f"a UNet that reads texts of width {list(self.unet.text_widths)}, and texts of {self.condition_size}",
            "equal widths",
            "change unet (text_sizes, cross_attention_dim) or text_encoder",
        )
        require(
            self.unet.condition_size is None and self.unet.spatial.dialect.class_embedding is None,
            f"a UNet with condition_size={self.unet.condition_size} (time_cond_proj_dim) and "
            f"class_embedding={self.unet.spatial.dialect.class_embedding!r}",
            "a UNet that reads latents, time and text",
            "take another folder; the UNet can be read by itself",
        )

    @property
    def parts(self) -> dict[str, Any]:
        """Each part's config by the name of its parameters and of its folder."""
        named = {name: getattr(self, name) for name in ("text_encoder", "unet", "vae")}
        return {name: within(part, self.compute) for name, part in named.items() if part is not None}

    @property
    def image_channels(self) -> int:
        """The number of channels of an image."""
        return 3 if self.vae is None else self.vae.out_channels

    @property
    def factor(self) -> int:
        """Pixels of an image's side for each position of its latents."""
        return 1 if self.vae is None else self.vae.factor

    @property
    def longest(self) -> int:
        """The number of tokens of a text, and of vectors of a condition."""
        return self.text_encoder.max_length

    @property
    def caption_length(self) -> int:
        """The number of ids of a caption in a batch."""
        return self.longest

    @property
    def condition_tokens(self) -> int:
        """The number of a condition's vectors."""
        return self.longest

    @property
    def condition_size(self) -> int:
        """The width of a condition's vectors."""
        return self.text_encoder.hidden_size

    def captions(self, tokenizers: Sequence[Any]) -> Captions:
        """Returns the conversion of captions, by tokenizers in the order of `tokenizers`."""
        return Captions.of(tokenizers[0], self.longest)

    @property
    def target_shape(self) -> tuple[int, int, int]:
        """The shape of the images of the training."""
        side = self.image_size or self.unet.sample_size[0] * self.factor
        return side, side, self.image_channels

    @staticmethod
    def sampler(scheduler: Any) -> Any:
        """Returns a scheduler as such a model samples with it. Raises ConfigError: it cannot."""
        return scheduler

    def make(self) -> TextToImage:
        return TextToImage(self)


class TextToImage(nn.Module):
    """A text encoder, a UNet and an autoencoder or none; its latents are those that the UNet reads.

    Attributes:
        companions: folder of the tokenizer and of the parts that are only carried along, from which `save_pretrained`
            copies them if it is given no other.
    """

    config: TextToImageConfig
    companions: str | None = None

    def setup(self):
        made = {name: part.make() for name, part in self.config.parts.items()}
        self.text_encoder, self.unet = made["text_encoder"], made["unet"]
        self.vae = made.get("vae")

    def __call__(self, tokens, latents, timesteps):
        """Returns the output of `denoise` for the tokens of texts."""
        if self.is_initializing():
            self.encode(self.decode(latents))
        return self.denoise(latents, timesteps, self.condition(tokens))

    def condition(self, tokens) -> jax.Array:
        """Encodes texts of int[B, longest] tokens, without a mask, to the condition dtype[B, longest, E]."""
        return self.text_encoder.states(tokens)

    def denoise(self, latents, timesteps, text) -> jax.Array:
        """Predicts what the scheduler's `prediction_type` names from noised latents.

        Args:
            latents: float[B, h, w, C].
            timesteps: [B].
            text: see `condition`.

        Returns:
            dtype[B, h, w, C].
        """
        return self.unet(latents, timesteps, text)

    def encode(self, images, noise=None) -> jax.Array:
        """Encodes images to latents, float32[B, h, w, C]: a sample of their distribution, or its mean without noise.

        Args:
            images: float[B, H, W, 3] in [0, 1].
            noise: float32[B, h, w, C], normally distributed.
        """
        if self.vae is None:
            return jnp.asarray(2 * images - 1, jnp.float32)
        return self._sampled(self.vae.encode(2 * images - 1), noise)

    def _sampled(self, distribution: tuple[jax.Array, jax.Array], noise: jax.Array | None) -> jax.Array:
        """Returns scaled latents of the autoencoder's distribution, (mean, log-variance)."""
        latents, log_variance = (each.astype(jnp.float32) for each in distribution)
        if noise is not None:
            latents += jnp.exp(log_variance / 2) * noise
        return self.config.vae.scaled(latents)

    def latents_of(self, targets) -> jax.Array:
        """Returns the latents of `target_shape` media of the training, whose pixels are uint8."""
        return self.encode(targets / 255)

    def decode(self, latents) -> jax.Array:
        """Decodes latents to images, float32[B, H, W, 3] in [0, 1]."""
        images = latents if self.vae is None else self.vae.decode(self.config.vae.unscaled(latents))
        return jnp.clip(images.astype(jnp.float32) / 2 + 0.5, 0, 1)
