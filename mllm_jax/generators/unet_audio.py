"""AudioLDM-2's UNet (arXiv 2308.05734), `AudioLDM2UNet2DConditionModel`: over a spectrogram's latents, with two texts.

It has the blocks of Stable Diffusion's UNet, with several transformers after each residual block: the first two may
read the first text, and those after them the second.
"""

from __future__ import annotations

from dataclasses import dataclass

import jax.numpy as jnp

from mllm_jax.checkpoints.config_json import check_written
from mllm_jax.checkpoints.fields import make_config
from mllm_jax.checkpoints.table import Family
from mllm_jax.errors import ConfigError
from mllm_jax.generators.unet import DOWN, MID, UP, Denoiser, UNetConfig, UNetDialect
from mllm_jax.generators.unet_blocks import TextStates
from mllm_jax.generators.unet_hub import FIXED, read_options, sample_inputs, table, written_options
from mllm_jax.layers.requirements import Requirements

FAMILY = "AudioLDM2UNet2DConditionModel"
MOST_TRANSFORMERS = 4  # after a residual block


@dataclass(frozen=True)
class AudioUNetConfig(UNetConfig):
    """Sizes of AudioLDM-2's UNet; the defaults are those of its base model."""

    sample_size: tuple[int, ...] | None = None
    in_channels: int = 8
    out_channels: int = 8
    channels: tuple[int, ...] = (128, 256, 384, 640)
    num_heads: tuple[int, ...] = (8,) * 4
    text_sizes: tuple[tuple[int | None, ...], ...] = ((None, 768, 1024),) * 4
    down_blocks: tuple[str, ...] = (DOWN[1], *DOWN[:1] * 3)
    up_blocks: tuple[str, ...] = (*UP[:1] * 3, UP[1])
    dialect: UNetDialect = UNetDialect(family=FAMILY)

    num_texts = 2
    mid_blocks = MID[:1]

    def _require_texts(self, require: Requirements) -> None:
        reading = [block for block, _ in self._reading()]
        widths = {(self.text_of(j), size) for block in reading for j, size in enumerate(block) if size is not None}
        require(
            len({text for text, _ in widths}) == len(widths) and all(0 < len(b) <= MOST_TRANSFORMERS for b in reading),
            f"text_sizes {list(self.text_sizes)}",
            f"up to {MOST_TRANSFORMERS} transformers after a residual block; the first two read a text of one width, "
            "the others a text of one width",
            "change text_sizes (cross_attention_dim)",
        )
        require(
            all(isinstance(depth, int) for depth in self.depths) and self.up_depths is None,
            f"depths {list(self.depths)}, up_depths {self.up_depths}",
            "one number for each block",
            "change depths or up_depths",
        )

    def text_of(self, transformer: int) -> int:
        return 0 if transformer <= 1 else 1

    def make(self) -> AudioUNet:
        return AudioUNet(self)


class AudioUNet(Denoiser):
    """UNet with two text conditions (reference: `AudioLDM2UNet2DConditionModel`)."""

    def __call__(
        self, latents, timesteps, text, text_1, text_mask=None, text_1_mask=None, class_labels=None, timestep_cond=None
    ):
        """Predicts the noise, or the velocity, of noised latents.

        Args:
            latents: float[B, T, M, in_channels], time by mel bands, of any size.
            timesteps: int or float[B], or one number for all.
            text: float[B, L, E], `encoder_hidden_states`: GPT-2's vectors.
            text_1: float[B, K, F], `encoder_hidden_states_1`: Flan-T5's states.
            text_mask, text_1_mask: [B, L] and [B, K], 0 at positions to be ignored; None: all count.
            class_labels, timestep_cond: see `UNet`.

        Returns:
            dtype[B, T, M, out_channels]

        Raises:
            ConfigError: arrays of other shapes.
        """
        texts = [TextStates(text, text_mask), TextStates(text_1, text_1_mask)]
        return self.denoise(latents, timesteps, texts, class_labels, timestep_cond)


# ---- diffusers folders


def from_hf_config(values: dict) -> AudioUNetConfig:
    """Reads config.json of AudioLDM2UNet2DConditionModel; every option is honoured or refused by name."""
    what = f"config.json of {FAMILY}"
    options, fields = read_options(values, what, FIXED)
    if not all(isinstance(depth, int) for depth in fields["depths"]):
        raise ConfigError(
            f"{what}: transformer_layers_per_block={values['transformer_layers_per_block']!r:.100}",
            "one number for each block",
            "restore it from its origin",
        )
    options.done()
    return make_config(AudioUNetConfig, **fields, family=FAMILY)


def to_hf_config(config: AudioUNetConfig) -> dict:
    """Returns config.json, the inverse of `from_hf_config`. Raises ConfigError: switches without an option."""
    return check_written(config, written_options(config), from_hf_config, "AudioLDM-2's UNet")


def sample(config: AudioUNetConfig) -> tuple:
    """Returns arguments with which `init` creates every parameter."""
    latents, timesteps, *more = sample_inputs(config)
    texts = (jnp.zeros((1, 1, width or 1)) for width in config.text_widths)
    return latents, timesteps, *texts, None, None, *more


FAMILIES = (
    Family(
        name="AudioLDM-2's UNet",
        architectures=(FAMILY,),
        from_hf=from_hf_config,
        to_hf=to_hf_config,
        table=table,
        sample=sample,
        oracle=f"diffusers {FAMILY}",
    ),
)
