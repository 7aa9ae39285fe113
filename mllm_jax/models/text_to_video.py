"""Zeroscope and ModelScope's text-to-video (arXiv 2308.06571): the folders of diffusers' `TextToVideoSDPipeline`.

It is a Stable Diffusion whose UNet reads all frames of a video; its autoencoder is that of images.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import jax
from flax import linen as nn

from mllm_jax.checkpoints.table import Family
from mllm_jax.generators.unet_video import VideoUNetConfig
from mllm_jax.models.stable_diffusion import StableDiffusionConfig, composed, sample, table
from mllm_jax.models.text_to_image import TextToImage

FAMILY = "TextToVideoSDPipeline"


@dataclass(frozen=True)
class TextToVideoConfig(StableDiffusionConfig):
    """The config of a generator of videos: CLIP's text encoder, a UNet of videos, an autoencoder, and a sampler."""

    unet: VideoUNetConfig
    family: str = FAMILY

    modality = "video"
    frames = 16  # of a video, if nothing else is asked for
    rate = 8  # frames a second
    carried = ("tokenizer",)
    unet_class = VideoUNetConfig

    @property
    def target_shape(self) -> tuple[int, ...]:
        """The shape of the videos of the training."""
        return self.frames, *super().target_shape

    def make(self) -> TextToVideo:
        return TextToVideo(self)


class TextToVideo(TextToImage):
    """`TextToImage` with videos [B, F, H, W, 3] and their latents [B, F, h, w, C] in the place of images."""

    config: TextToVideoConfig

    def encode(self, images, noise=None) -> jax.Array:
        return _by_frame(TextToImage.encode, self, images, noise)

    def decode(self, latents) -> jax.Array:
        return _by_frame(TextToImage.decode, self, latents)


def _by_frame(method: Callable, module: TextToVideo, *videos: jax.Array | None) -> jax.Array:
    """Applies a method to one frame after the other of videos [B, F, ...], so that memory is that of one frame."""

    def one(module: TextToVideo, carry: None, frames: tuple) -> tuple[None, jax.Array]:
        return carry, method(module, *frames)

    scan = nn.scan(one, variable_broadcast="params", split_rngs={"params": False}, in_axes=1, out_axes=1)
    return scan(module, None, videos)[1]


# ---- folders of diffusers


def from_parts(parts: Mapping[str, Any]) -> TextToVideoConfig:
    """Builds the config from those of the parts of a folder, by their names; raises as `composed`.

    The scheduler is the folder's: unlike a Stable Diffusion's pipeline, this one replaces no option of it.
    """
    return composed(parts, TextToVideoConfig)


FAMILIES = (
    Family(
        name="Zeroscope",
        architectures=(FAMILY,),
        from_hf=from_parts,
        to_hf=lambda config: config.parts | dict(scheduler=config.scheduler),
        table=table,
        sample=sample,
    ),
)
