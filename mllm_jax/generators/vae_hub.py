"""The folders of diffusers' `AutoencoderKL`: their options, read and written, and the names of their weights."""

from __future__ import annotations

import jax.numpy as jnp

from mllm_jax.checkpoints.architectures import kind_of
from mllm_jax.checkpoints.config_json import Fields, check_written, one_or_several, read_fields, write_fields
from mllm_jax.checkpoints.config_options import ConfigOptions
from mllm_jax.checkpoints.table import Family, Table, Weight, linear, norm
from mllm_jax.errors import ConfigError
from mllm_jax.generators.basic import conv2d
from mllm_jax.generators.vae import AutoencoderKLConfig

ACTIVATIONS = {"silu": "silu", "swish": "silu", "gelu": "gelu", "relu": "relu"}
MOST_BLOCKS, MOST_LAYERS = 16, 64  # far more than any autoencoder has
DOWN, UP = "DownEncoderBlock2D", "UpDecoderBlock2D"
_FIELDS: Fields = {
    "in_channels": ("in_channels", "size", 3),
    "out_channels": ("out_channels", "size", 3),
    "latent_channels": ("latent_channels", "size", 4),
    "block_channels": ("block_out_channels", "sizes", (64,)),
    "layers_per_block": ("layers_per_block", "size", 1, MOST_LAYERS),
    "activation": ("act_fn", "activation", ACTIVATIONS, "silu"),
    "norm_groups": ("norm_num_groups", "size", 32),
    "sample_size": ("sample_size", "sizes", (32,)),
    "scaling_factor": ("scaling_factor", "number", 0.18215),
    "shift_factor": ("shift_factor", "number", None),
    "latents_mean": ("latents_mean", "numbers", None),
    "latents_std": ("latents_std", "numbers", None),
    "force_upcast": ("force_upcast", "flag", True),
    "quant_conv": ("use_quant_conv", "flag", True),
    "post_quant_conv": ("use_post_quant_conv", "flag", True),
    "middle_attention": ("mid_block_add_attention", "flag", True),
}
# Names of the attention's weights until diffusers 0.18.
_OLD_NAMES = tuple(
    (rf"(\.attentions\.0)\.{old}\.", rf"\1.{new}.")
    for old, new in {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}.items()
)


def from_hf_config(values: dict) -> AutoencoderKLConfig:
    """Reads config.json of `AutoencoderKL`.

    Raises:
        ConfigError: an unsupported option.
    """
    what = f"config.json of {AutoencoderKLConfig.family}"
    options = ConfigOptions(values, what)
    fields = read_fields(options, _FIELDS)
    blocks = len(fields["block_channels"])
    for name, kind in {"down_block_types": DOWN, "up_block_types": UP}.items():
        kinds = options.texts(name, (kind,))
        if kinds != (kind,) * blocks or blocks > MOST_BLOCKS:
            raise ConfigError(
                f"{what}: {name}={list(kinds)[:MOST_BLOCKS]} and {blocks} block_out_channels",
                f"{kind} for each of block_out_channels, at most {MOST_BLOCKS}",
                "convert another checkpoint; other blocks are not supported",
            )
    options.done()
    return AutoencoderKLConfig(**fields)


def to_hf_config(config: AutoencoderKLConfig) -> dict:
    """Returns config.json of `AutoencoderKL`."""
    c, blocks = config, len(config.block_channels)
    written = dict(
        **kind_of(c.family),
        **write_fields(c, _FIELDS),
        down_block_types=[DOWN] * blocks,
        up_block_types=[UP] * blocks,
    )
    written["sample_size"] = one_or_several(c.sample_size)
    return check_written(c, written, from_hf_config, "an autoencoder")


def table(config: AutoencoderKLConfig) -> Table:
    """Returns the table of `AutoencoderKL`'s weights."""
    c, last = config, len(config.block_channels) - 1
    weights = []
    for part, blocks, names, layers in (
        ("encoder", "down_blocks", "downsamplers", c.layers_per_block),
        ("decoder", "up_blocks", "upsamplers", c.layers_per_block + 1),
    ):
        widths = c.block_channels if part == "encoder" else c.block_channels[::-1]
        weights += conv2d(f"{part}.conv_in", f"{part}/conv_in")
        width = c.block_channels[0] if part == "encoder" else c.block_channels[-1]
        for i, wide in enumerate(widths):
            for j in range(layers):
                name, path = f"{part}.{blocks}.{i}.resnets.{j}", f"{part}/block_{i}_residual_{j}"
                weights += _residual(name, path, shortcut=width != wide)
                width = wide
            if i < last:
                sampler = "down" if part == "encoder" else "up"
                weights += conv2d(f"{part}.{blocks}.{i}.{names}.0.conv", f"{part}/block_{i}_{sampler}")
        for j in range(2):
            weights += _residual(f"{part}.mid_block.resnets.{j}", f"{part}/middle/residual_{j}")
        if c.middle_attention:
            weights += _attention(f"{part}.mid_block.attentions.0", f"{part}/middle/attention")
        weights += norm(f"{part}.conv_norm_out", f"{part}/out/norm") + conv2d(f"{part}.conv_out", f"{part}/out/conv")
    if c.quant_conv:
        weights += conv2d("quant_conv", "quant_conv")
    if c.post_quant_conv:
        weights += conv2d("post_quant_conv", "post_quant_conv")
    return Table(tuple(weights), spellings=_OLD_NAMES)


def _residual(name: str, path: str, shortcut: bool = False) -> list[Weight]:
    weights = []
    for number, step in enumerate(("first", "second"), 1):
        weights += norm(f"{name}.norm{number}", f"{path}/{step}/norm")
        weights += conv2d(f"{name}.conv{number}", f"{path}/{step}/conv")
    return weights + (conv2d(f"{name}.conv_shortcut", f"{path}/shortcut") if shortcut else [])


def _attention(name: str, path: str) -> list[Weight]:
    weights = norm(f"{name}.group_norm", f"{path}/norm")
    for theirs, ours in {"to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "out"}.items():
        weights += linear(f"{name}.{theirs}", f"{path}/{ours}")
    return weights


def sample(config: AutoencoderKLConfig) -> tuple:
    """Returns arguments with which `init` creates every parameter: one image of the smallest size."""
    return (jnp.zeros((1, config.factor, config.factor, config.in_channels)),)


FAMILIES = (
    Family(
        name="Autoencoder of latent diffusion",
        architectures=(AutoencoderKLConfig.family,),
        from_hf=from_hf_config,
        to_hf=to_hf_config,
        table=table,
        sample=sample,
        oracle="diffusers.AutoencoderKL",
    ),
)
