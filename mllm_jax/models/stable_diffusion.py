"""Stable Diffusion (latent diffusion, arXiv 2112.10752): a text encoder, a UNet and an autoencoder as one model.

The names of its parts are those of diffusers' folder: `text_encoder`, `unet`, `vae`. Inside a larger model it is the
part `generator_image`, whose patterns then read `generator_image/unet/*`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from mllm_jax.checkpoints.table import Family, Table, nested
from mllm_jax.encoders.clip_text import MODEL as TEXT_ENCODER
from mllm_jax.encoders.text_encoder import TextTowerConfig
from mllm_jax.errors import ConfigError
from mllm_jax.generators.unet import UNetConfig
from mllm_jax.generators.vae import AutoencoderKLConfig
from mllm_jax.layers.compute import WithCompute, within
from mllm_jax.layers.requirements import Requirements
from mllm_jax.models.parts import part_table

FAMILY = "StableDiffusionPipeline"
PARTS = dict(text_encoder=TextTowerConfig, unet=UNetConfig, vae=AutoencoderKLConfig, scheduler=object)


@dataclass(frozen=True)
class StableDiffusionConfig(WithCompute):
    """The parts of a Stable Diffusion and its sampler.

    Attributes:
        text_encoder: CLIP's; its last hidden states are the condition.
        scheduler: the sampler of the folder, see `mllm_jax.generators.schedulers`.
        family: the class of the saved folder.
    """

    text_encoder: TextTowerConfig
    unet: UNetConfig
    vae: AutoencoderKLConfig
    scheduler: Any
    family: str = FAMILY

    def __post_init__(self):
        require, latents = Requirements("Stable Diffusion", self), self.vae.latent_channels
        width, read = self.text_encoder.hidden_size, self.unet.text_widths
        require(
            self.text_encoder.family == TEXT_ENCODER,
            f"a text encoder of class {self.text_encoder.family}",
            f"{TEXT_ENCODER}, whose hidden states are the condition",
            "change text_encoder",
        )
        require(
            self.unet.in_channels == self.unet.out_channels == latents,
            f"a UNet from {self.unet.in_channels} to {self.unet.out_channels} channels and latents of {latents}",
            "equal numbers; a UNet for inpainting reads more channels",
            "change unet or vae",
        )
        require(
            read == (width,),
            f"a UNet that reads texts of width {list(read)}, and texts of {width}",
            "equal widths",
            "change unet (cross_attention_dim) or text_encoder",
        )
        require(
            self.unet.condition_size is None and self.unet.dialect.class_embedding is None,
            f"a UNet with condition_size={self.unet.condition_size} (time_cond_proj_dim) and "
            f"class_embedding={self.unet.dialect.class_embedding!r}",
            "a UNet that reads latents, time and text",
            "take another folder; the UNet can be read by itself",
        )

    @property
    def parts(self) -> dict[str, Any]:
        """Each part's config by the name of its parameters and of its folder."""
        return {name: within(getattr(self, name), self.compute) for name in ("text_encoder", "unet", "vae")}

    @property
    def longest(self) -> int:
        """Number of tokens of a text."""
        return self.text_encoder.max_length

    def make(self) -> StableDiffusion:
        return StableDiffusion(self)


class StableDiffusion(nn.Module):
    """A text encoder, a UNet and an autoencoder; its latents are those that the UNet reads.

    Attributes:
        companions: folder of the tokenizer and of the parts that are only carried along, from which `save_pretrained`
            copies them if it is given no other.
    """

    config: StableDiffusionConfig
    companions: str | None = None

    def setup(self):
        parts = self.config.parts
        self.text_encoder, self.unet, self.vae = (parts[name].make() for name in ("text_encoder", "unet", "vae"))

    def __call__(self, tokens, latents, timesteps):
        """Returns the output of `denoise` for the tokens of texts."""
        if self.is_initializing():
            self.vae(self.decode(latents))
        return self.denoise(latents, timesteps, self.condition(tokens))

    def condition(self, tokens) -> jax.Array:
        """Encodes texts of int[B, longest] tokens, without a mask, to the condition dtype[B, longest, E]."""
        return self.text_encoder(tokens).last_hidden_state

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
        latents, log_variance = (each.astype(jnp.float32) for each in self.vae.encode(2 * images - 1))
        if noise is not None:
            latents += jnp.exp(log_variance / 2) * noise
        return self.config.vae.scaled(latents)

    def decode(self, latents) -> jax.Array:
        """Decodes latents to images, float32[B, H, W, 3] in [0, 1]."""
        images = self.vae.decode(self.config.vae.unscaled(latents)).astype(jnp.float32)
        return jnp.clip(images / 2 + 0.5, 0, 1)


# ---- folders of diffusers


def from_parts(parts: Mapping[str, Any]) -> StableDiffusionConfig:
    """Builds the config from those of the parts of a folder, by their names.

    Raises:
        ConfigError: a part is missing, is unknown, or is of another class.
    """
    wrong = [f"no {name}" for name in PARTS if name not in parts]
    wrong += [f"{name} of class {type(part).__name__}" for name, part in parts.items() if name not in PARTS]
    wrong += [
        f"{name} of class {getattr(parts[name], 'family', type(parts[name]).__name__)}"
        for name, kind in PARTS.items()
        if name in parts and not isinstance(parts[name], kind)
    ]
    if wrong:
        raise ConfigError(
            f"a {FAMILY} with {', '.join(wrong)}",
            "CLIPTextModel as text_encoder, UNet2DConditionModel as unet, AutoencoderKL as vae, and a scheduler",
            "take another folder; parts can be read by themselves",
        )
    return StableDiffusionConfig(**{**parts, "scheduler": sampler(parts["scheduler"])})


def sampler(scheduler: Any) -> Any:
    """Returns a scheduler with two settings that diffusers' pipeline replaces in old folders.

    Predicted latents are not clipped to [-1, 1] (`clip_sample`), and `steps_offset` is 1.

    Raises:
        ConfigError: a scheduler of flow matching, which a Stable Diffusion is not trained for.
    """
    options = {"clip_sample": False, "steps_offset": 1}
    names = {each.name for each in fields(scheduler)}
    if "steps_offset" not in names:
        raise ConfigError(
            f"a Stable Diffusion with {scheduler.class_name}", "a scheduler of diffusion", "name another scheduler"
        )
    return replace(scheduler, **{name: value for name, value in options.items() if name in names})


def table(config: StableDiffusionConfig) -> Table:
    """Returns the weights of all parts; names and paths begin with the part's name."""
    return Table(sum((nested(part_table(part), f"{name}.", f"{name}/") for name, part in config.parts.items()), ()))


def sample(config: StableDiffusionConfig) -> tuple:
    """Returns arguments with which `init` creates every parameter."""
    side = 2 ** len(config.unet.channels)
    latents = jnp.zeros((1, side, side, config.unet.in_channels))
    return jnp.zeros((1, config.longest), jnp.int32), latents, jnp.zeros((1,), jnp.int32)


FAMILIES = (
    Family(
        name="Stable Diffusion",
        architectures=(FAMILY,),
        from_hf=from_parts,
        to_hf=lambda config: config.parts | dict(scheduler=config.scheduler),
        table=table,
        sample=sample,
    ),
)
