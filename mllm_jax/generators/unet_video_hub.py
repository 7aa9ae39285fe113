"""Folders of diffusers' `UNet3DConditionModel`: options of config.json and names of tensors."""

from __future__ import annotations

import jax.numpy as jnp

from mllm_jax.checkpoints.architectures import kind_of
from mllm_jax.checkpoints.config_json import Fields, check_written, one_or_several, read_fields, write_fields
from mllm_jax.checkpoints.config_options import ConfigOptions
from mllm_jax.checkpoints.table import Family, Table, Weight, linear, norm
from mllm_jax.errors import ConfigError
from mllm_jax.generators import unet_hub
from mllm_jax.generators.unet_blocks import ACTIVATIONS
from mllm_jax.generators.unet_hub import MOST_CHANNELS, MOST_LAYERS, attending_layers, named_blocks, transformer, usual
from mllm_jax.generators.unet_temporal import CONVOLUTIONS
from mllm_jax.generators.unet_video import FAMILY, FIRST_HEADS, VIDEO_DOWN, VIDEO_UP, VideoUNetConfig

_CROSS_DOWN, _DOWN = VIDEO_DOWN
_CROSS_UP, _UP = VIDEO_UP
OVER_TIME = "o i t 1 1 -> t 1 i o"  # from the stored axes of a convolution over time to the parameter's
_FIELDS: Fields = {
    "sample_size": ("sample_size", "sizes", None),
    "in_channels": ("in_channels", "size", 4, MOST_CHANNELS),
    "out_channels": ("out_channels", "size", 4, MOST_CHANNELS),
    "channels": ("block_out_channels", "sizes", (320, 640, 1280, 1280), MOST_CHANNELS),
    "layers": ("layers_per_block", "size", 2, MOST_LAYERS),
    "head_dim": ("attention_head_dim", "size", 64, MOST_CHANNELS),
    "text_size": ("cross_attention_dim", "size", 1024, MOST_CHANNELS),
    "down_blocks": ("down_block_types", "texts", (*[_CROSS_DOWN] * 3, _DOWN)),
    "up_blocks": ("up_block_types", "texts", (_UP, *[_CROSS_UP] * 3)),
    "norm_groups": ("norm_num_groups", "size", 32),
    "norm_eps": ("norm_eps", "number", 1e-5, 0.0, 1.0),
    "activation": ("act_fn", "only", "silu", *ACTIVATIONS),
    "downsample_padding": ("downsample_padding", "count", 1),
    "mid_scale": ("mid_block_scale_factor", "number", 1, 1e-12, 1e12),
    "condition_size": ("time_cond_proj_dim", "size", None, MOST_CHANNELS),
}
_NEVER_NULL = {name for name, _, default, *_ in _FIELDS.values() if default is not None}


def from_hf_config(values: dict) -> VideoUNetConfig:
    """Reads config.json of UNet3DConditionModel; every option is honoured or refused by name."""
    what = f"config.json of {FAMILY}"
    options = ConfigOptions(usual(values, what, _NEVER_NULL), what)
    options.only("num_attention_heads", None)
    fields = read_fields(options, _FIELDS)
    if fields["sample_size"] is not None and len(fields["sample_size"]) not in (1, 2):
        raise ConfigError(f"{what}: sample_size={values['sample_size']}", "a side, or height and width", "restore it")
    options.done()
    return VideoUNetConfig(**fields)


def to_hf_config(config: VideoUNetConfig) -> dict:
    """Returns config.json, the inverse of `from_hf_config`."""
    written = kind_of(FAMILY) | write_fields(config, _FIELDS)
    written["sample_size"] = None if config.sample_size is None else one_or_several(config.sample_size)
    written |= {name: list(written[name]) for name in ("down_block_types", "up_block_types")}
    return check_written(config, written, from_hf_config, "a UNet of videos")


def table(config: VideoUNetConfig) -> Table:
    """Returns the table of the weights under diffusers' names."""
    c = config.spatial
    weights = [*unet_hub.table(c).weights]
    weights += transformer((FIRST_HEADS, config.head_dim), 1, "transformer_in", "transformer_in", True)
    for block, name, path in named_blocks(c):
        for i in range(len(block.inputs)):
            weights += _convolutions(f"{name}.temp_convs.{i}", f"{path}/temporal_convolutions_{i}")
        for i in range(attending_layers(block, path)):
            heads, ours = (block.num_heads, block.head_dim), f"{path}/temporal_transformer_{i}"
            weights += transformer(heads, 1, f"{name}.temp_attentions.{i}", ours, True)
    return Table(tuple(weights))


def _convolutions(name: str, path: str) -> list[Weight]:
    weights = []
    for i in range(1, CONVOLUTIONS + 1):
        weights += norm(f"{name}.conv{i}.0", f"{path}/norm_{i}")
        # All but the first have a dropout before the convolution, which counts in its name.
        weights += linear(f"{name}.conv{i}.{2 if i == 1 else 3}", f"{path}/conv_{i}", OVER_TIME)
    return weights


def sample(config: VideoUNetConfig) -> tuple:
    """Returns arguments with which `init` creates every parameter."""
    latents, timesteps, _, condition = unet_hub.sample_inputs(config.spatial)
    return latents[:, None], timesteps, jnp.zeros((1, 1, config.text_size)), condition


FAMILIES = (
    Family(
        name="Zeroscope's UNet",
        architectures=(FAMILY,),
        from_hf=from_hf_config,
        to_hf=to_hf_config,
        table=table,
        sample=sample,
        oracle=f"diffusers {FAMILY}",
    ),
)
