"""Folders of diffusers' `SD3Transformer2DModel`: options of config.json and names of tensors."""

from __future__ import annotations

import jax.numpy as jnp

from mllm_jax.checkpoints.architectures import kind_of
from mllm_jax.checkpoints.config_json import Fields, check_written, read_fields, write_fields
from mllm_jax.checkpoints.config_options import ConfigOptions
from mllm_jax.checkpoints.table import OUT_OF_HEADS, Family, Table, Weight, into_heads, linear, norm
from mllm_jax.errors import ConfigError
from mllm_jax.generators.sd3 import FAMILY, Run, SD3TransformerConfig
from mllm_jax.generators.unet_hub import MOST_CHANNELS, MOST_LAYERS, two_linear, usual

MOST_PATCHES = 4096  # along a side of the table of positions
_FIELDS: Fields = {
    "sample_size": ("sample_size", "size", 128),
    "patch_size": ("patch_size", "size", 2, MOST_CHANNELS),
    "in_channels": ("in_channels", "size", 16, MOST_CHANNELS),
    "num_layers": ("num_layers", "size", 18, MOST_LAYERS),
    "head_dim": ("attention_head_dim", "size", 64, MOST_CHANNELS),
    "num_heads": ("num_attention_heads", "size", 18, MOST_CHANNELS),
    "text_size": ("joint_attention_dim", "size", 4096, MOST_CHANNELS),
    "pooled_size": ("pooled_projection_dim", "size", 2048, MOST_CHANNELS),
    "max_patches": ("pos_embed_max_size", "size", 96, MOST_PATCHES),
    "dual_layers": ("dual_attention_layers", "counts", ()),
}
_TEXT_WIDTH, _OUT, _QK_NORM = ("caption_projection_dim", 1152), ("out_channels", 16), ("qk_norm", "rms_norm")
_NEVER_NULL = {name for name, *_ in _FIELDS.values()} | {_TEXT_WIDTH[0]}


def from_hf_config(values: dict) -> SD3TransformerConfig:
    """Reads config.json of SD3Transformer2DModel; every option is honoured or refused by name.

    `out_channels` null is `in_channels`, as in diffusers. `caption_projection_dim` is the hidden size: diffusers makes
    a model of any other, which fails when it is called.
    """
    what = f"config.json of {FAMILY}"
    options = ConfigOptions(usual(values, what, _NEVER_NULL), what)
    fields = read_fields(options, _FIELDS)
    name, default = _OUT
    fields[name] = options.size(name, fields["in_channels"] if name in values else default, MOST_CHANNELS)
    fields["qk_norm"] = options.only(_QK_NORM[0], None, _QK_NORM[1]) is not None
    text_width = options.size(*_TEXT_WIDTH)
    options.done()
    config = SD3TransformerConfig(**fields)
    if text_width != config.hidden_size:
        raise ConfigError(
            f"{what}: {_TEXT_WIDTH[0]}={text_width}",
            f"{config.hidden_size}, which is num_attention_heads * attention_head_dim",
            "restore it from its origin",
        )
    return config


def to_hf_config(config: SD3TransformerConfig) -> dict:
    """Returns config.json, the inverse of `from_hf_config`."""
    written = kind_of(FAMILY) | write_fields(config, _FIELDS)
    written |= {_TEXT_WIDTH[0]: config.hidden_size, _OUT[0]: config.out_channels}
    written[_QK_NORM[0]] = _QK_NORM[1] if config.qk_norm else None
    return check_written(config, written, from_hf_config, "a transformer of Stable Diffusion 3")


# ---- tensors


def table(config: SD3TransformerConfig) -> Table:
    """Returns the table of the weights under diffusers' names."""
    c = config
    weights = [Weight("pos_embed.pos_embed", "positions", "1 (h w) e -> h w e", {"h": c.max_patches})]
    weights += linear("pos_embed.proj", "patches", "e c p q -> (p q c) e", {"p": c.patch_size, "q": c.patch_size})
    weights += two_linear("time_text_embed.timestep_embedder", "time_embedding")
    weights += two_linear("time_text_embed.text_embedder", "pooled_embedding")
    weights += linear("context_embedder", "text") + linear("proj_out", "out")
    weights += _modulation("norm_out", "modulation_out", 2)
    for run in c.runs:
        weights += _blocks(c, run)
    return Table(tuple(weights))


def _modulation(name: str, path: str, count: int) -> list[Weight]:
    sizes = {"m": count}
    kernel = Weight(f"{name}.linear.weight", f"{path}/kernel", "(m o) i -> i m o", sizes)
    return [kernel, Weight(f"{name}.linear.bias", f"{path}/bias", "(m o) -> m o", sizes)]


def _blocks(c: SD3TransformerConfig, run: Run) -> list[Weight]:
    name, path = f"transformer_blocks.{{layer*1+{run.start}}}", run.path
    weights = _modulation(f"{name}.norm1", f"{path}/modulation", 9 if run.dual else 6)
    weights += _modulation(f"{name}.norm1_context", f"{path}/text_modulation", 2 if run.last else 6)
    hub, ours = f"{name}.attn", f"{path}/attention"
    weights += _attention(c, [f"{hub}.to_{letter}" for letter in "qkv"], f"{hub}.norm_", f"{ours}/patches")
    weights += _attention(c, [f"{hub}.add_{letter}_proj" for letter in "qkv"], f"{hub}.norm_added_", f"{ours}/text")
    outs = {f"{hub}.to_out.0": f"{ours}/patches"} | ({} if run.last else {f"{hub}.to_add_out": f"{ours}/text"})
    if run.dual:
        hub, ours = f"{name}.attn2", f"{path}/attention_2"
        weights += _attention(c, [f"{hub}.to_{letter}" for letter in "qkv"], f"{hub}.norm_", ours)
        outs[f"{hub}.to_out.0"] = ours
    for hub, ours in outs.items():
        weights += linear(hub, f"{ours}/out", OUT_OF_HEADS, {"h": c.head_dim})
    mlps = {"ff": "mlp"} | ({} if run.last else {"ff_context": "text_mlp"})
    for hub, ours in mlps.items():
        weights += linear(f"{name}.{hub}.net.0.proj", f"{path}/{ours}/up")
        weights += linear(f"{name}.{hub}.net.2", f"{path}/{ours}/down")
    return weights


def _attention(c: SD3TransformerConfig, names: list[str], norm_name: str, path: str) -> list[Weight]:
    weights = into_heads(names, path, c.head_dim, (c.hidden_size,) * 3)
    for letter in "qk" if c.qk_norm else "":
        weights += norm(f"{norm_name}{letter}", f"{path}/{letter}_norm", bias=False)
    return weights


def sample(config: SD3TransformerConfig) -> tuple:
    """Returns arguments with which `init` creates every parameter: latents of one patch, and a text."""
    c = config
    latents = jnp.zeros((1, c.patch_size, c.patch_size, c.in_channels))
    return latents, jnp.zeros((1,)), jnp.zeros((1, 1, c.text_size)), jnp.zeros((1, c.pooled_size))


FAMILIES = (
    Family(
        name="Stable Diffusion 3's transformer",
        architectures=(FAMILY,),
        from_hf=from_hf_config,
        to_hf=to_hf_config,
        table=table,
        sample=sample,
        oracle=f"diffusers {FAMILY}",
    ),
)
