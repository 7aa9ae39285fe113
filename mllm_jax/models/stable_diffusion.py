"""Stable Diffusion (latent diffusion, arXiv 2112.10752): the folders of diffusers' `StableDiffusionPipeline`.

The names of its parts are those of the folder: `text_encoder`, `unet`, `vae`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Any, TypeVar

import jax.numpy as jnp

from mllm_jax.checkpoints.table import Family, Table, nested
from mllm_jax.encoders.clip_text import MODEL as TEXT_ENCODER
from mllm_jax.encoders.text_encoder import TextTowerConfig
from mllm_jax.errors import ConfigError
from mllm_jax.generators.unet import UNetConfig
from mllm_jax.generators.vae import AutoencoderKLConfig
from mllm_jax.layers.requirements import Requirements
from mllm_jax.models.parts import part_table
from mllm_jax.models.text_to_image import TextToImageConfig

FAMILY = "StableDiffusionPipeline"
Config = TypeVar("Config", bound="StableDiffusionConfig")


@dataclass(frozen=True)
class StableDiffusionConfig(TextToImageConfig):
    """The config of a Stable Diffusion: CLIP's text encoder, a UNet of latents, and a sampler.

    Attributes:
        family: the class of the saved folder.
    """

    family: str = FAMILY

    carried = ("tokenizer", "feature_extractor", "image_encoder", "safety_checker")  # subfolders that are copied
    unet_class = UNetConfig

    def __post_init__(self):
        super().__post_init__()
        Requirements("Stable Diffusion", self)(
            self.text_encoder.family == TEXT_ENCODER and self.vae is not None,
            f"a text encoder of class {self.text_encoder.family}" + (" without an autoencoder" * (self.vae is None)),
            f"{TEXT_ENCODER}, whose hidden states are the condition, and an AutoencoderKL",
            "change text_encoder or vae",
        )

    @staticmethod
    def sampler(scheduler: Any) -> Any:
        """Returns a scheduler with two settings that diffusers' pipeline replaces in old folders.

        Predicted latents are not clipped to [-1, 1] (`clip_sample`), and `steps_offset` is 1.

        Raises:
            ConfigError: a scheduler of flow matching.
        """
        require_diffusion(scheduler)
        options = {"clip_sample": False, "steps_offset": 1}
        names = {each.name for each in fields(scheduler)}
        return replace(scheduler, **{name: value for name, value in options.items() if name in names})


# ---- folders of diffusers


def from_parts(parts: Mapping[str, Any]) -> StableDiffusionConfig:
    """Builds the config from those of the parts of a folder, by their names; raises as `composed`."""
    found = composed(parts, StableDiffusionConfig)
    return replace(found, scheduler=found.sampler(found.scheduler))


def composed(parts: Mapping[str, Any], config: type[Config]) -> Config:
    """Builds a config of a class from those of the parts of a folder, by their names.

    Raises:
        ConfigError: a part is missing, is unknown, or is of another class.
    """
    kinds = dict(text_encoder=TextTowerConfig, unet=config.unet_class, vae=AutoencoderKLConfig, scheduler=object)
    wrong = [f"no {name}" for name in kinds if name not in parts]
    wrong += [f"{name} of class {type(part).__name__}" for name, part in parts.items() if name not in kinds]
    wrong += [
        f"{name} of class {getattr(parts[name], 'family', type(parts[name]).__name__)}"
        for name, kind in kinds.items()
        if name in parts and not isinstance(parts[name], kind)
    ]
    if wrong:
        raise ConfigError(
            f"a {config.family} with {', '.join(wrong)}",
            f"CLIPTextModel as text_encoder, {config.unet_class().family} as unet, AutoencoderKL as vae, and a "
            "scheduler",
            "take another folder; parts can be read by themselves",
        )
    require_diffusion(parts["scheduler"])
    return config(**parts)


def require_diffusion(scheduler: Any) -> None:
    """Raises ConfigError for a scheduler of flow matching, which a Stable Diffusion is not trained for."""
    if "steps_offset" not in {each.name for each in fields(scheduler)}:
        raise ConfigError(
            f"a Stable Diffusion with {scheduler.class_name}", "a scheduler of diffusion", "name another scheduler"
        )


def table(config: StableDiffusionConfig) -> Table:
    """Returns the weights of all parts; names and paths begin with the part's name."""
    return Table(sum((nested(part_table(part), f"{name}.", f"{name}/") for name, part in config.parts.items()), ()))


def sample(config: StableDiffusionConfig) -> tuple:
    """Returns arguments with which `init` creates every parameter."""
    side, unet = 2 ** len(config.unet.channels), config.unet
    latents = jnp.zeros((*[1] * (len(unet.axes) - 2), side, side, unet.in_channels))
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
