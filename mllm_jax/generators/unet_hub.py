"""Folders of UNets in diffusers' format: options of config.json and names of tensors."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from typing import Any

import jax.numpy as jnp

from mllm_jax.checkpoints.architectures import kind_of
from mllm_jax.checkpoints.config_json import Fields, check_written, one_or_several, read_fields, write_fields
from mllm_jax.checkpoints.config_options import ConfigOptions, is_whole
from mllm_jax.checkpoints.fields import make_config
from mllm_jax.checkpoints.table import Family, Table, Weight, beside, into_heads, linear, norm
from mllm_jax.errors import ConfigError
from mllm_jax.generators.basic import conv2d
from mllm_jax.generators.unet import DOWN, MID, UP, UNetConfig
from mllm_jax.generators.unet_blocks import ACTIVATIONS, UNetBlock

MOST_LAYERS, MOST_CHANNELS, MOST_KERNEL = 100, 1 << 16, 63  # limits of a config.json
_POSITIVE = (1e-12, 1e12)
# Options for one field each, in every family.
FIELDS: Fields = {
    "in_channels": ("in_channels", "size", 4, MOST_CHANNELS),
    "out_channels": ("out_channels", "size", 4, MOST_CHANNELS),
    "norm_groups": ("norm_num_groups", "size", 32),
    "norm_eps": ("norm_eps", "number", 1e-5, 0.0, 1.0),
    "activation": ("act_fn", "only", "silu", *ACTIVATIONS),
    "linear_projection": ("use_linear_projection", "flag", False),
    "upcast_attention": ("upcast_attention", "flag", False),
    "flip_sin_to_cos": ("flip_sin_to_cos", "flag", True),
    "freq_shift": ("freq_shift", "number", 0, -1e6, 1e6),
    "time_size": ("time_embedding_dim", "size", None, MOST_CHANNELS),
    "time_activation": ("time_embedding_act_fn", "only", None, *ACTIVATIONS),
    "time_post_activation": ("timestep_post_act", "only", None, *ACTIVATIONS),
    "condition_size": ("time_cond_proj_dim", "size", None, MOST_CHANNELS),
    "downsample_padding": ("downsample_padding", "count", 1),
    "mid_scale": ("mid_block_scale_factor", "number", 1, *_POSITIVE),
    "conv_in_kernel": ("conv_in_kernel", "size", 3, MOST_KERNEL),
    "conv_out_kernel": ("conv_out_kernel", "size", 3, MOST_KERNEL),
    "class_concat": ("class_embeddings_concat", "flag", False),
}
_CENTER: Fields = {"center_input": ("center_input_sample", "flag", False)}
# Options with one supported value, in every family, and in this one.
FIXED: dict[str, Any] = dict(num_attention_heads=None, time_embedding_type="positional")
_FIXED: dict[str, Any] = FIXED | dict(
    dual_cross_attention=False, encoder_hid_dim=None, encoder_hid_dim_type=None, addition_embed_type=None,
    addition_time_embed_dim=None, resnet_skip_time_act=False, resnet_out_scale_factor=1.0, attention_type="default",
    mid_block_only_cross_attention=False, cross_attention_norm=None,
)  # fmt: skip
# Options of which null is not the default.
_NEVER_NULL = {name for name, _, default, *_ in (*FIELDS.values(), *_CENTER.values()) if default is not None} | {
    "block_out_channels", "layers_per_block", "attention_head_dim", "cross_attention_dim", "only_cross_attention",
    "transformer_layers_per_block", "down_block_types", "up_block_types", "resnet_time_scale_shift",
}  # fmt: skip


def usual(values: dict, what: str, never_null: Collection[str]) -> dict:
    """Returns the options with the usual names of activations. Raises ConfigError: one is null that may not be."""
    if nulls := [name for name in never_null if name in values and values[name] is None]:
        raise ConfigError(f"{what} with {', '.join(sorted(nulls))} null", "values", "restore it from its origin")
    for name in ("act_fn", "time_embedding_act_fn", "timestep_post_act"):
        if isinstance(given := values.get(name), str):  # diffusers reads them in any case
            values = values | {name: "silu" if given.lower() == "swish" else given.lower()}
    return values


def read_options(values: dict, what: str, fixed: dict[str, Any]) -> tuple[ConfigOptions, dict]:
    """Reads what all families have in common.

    Args:
        what: name of the file in messages.
        fixed: options with one supported value.

    Returns:
        the options, some of which are left to be read, and the fields of the config.

    Raises:
        ConfigError: an unsupported option; names it.
    """
    values = usual(values, what, _NEVER_NULL)
    options = ConfigOptions(values, what)
    for name, value in fixed.items():
        options.only(name, value)
    channels = options.sizes("block_out_channels", (320, 640, 1280, 1280), MOST_CHANNELS)
    count = len(channels)

    def each(name: str, default: Any, read: Callable) -> tuple:
        """Returns the option's value for each block."""
        several = isinstance(values.get(name, default), (list, tuple))
        found = read(name, default if several or isinstance(default, tuple) else (default,))
        return found if several else found * count

    sizes = lambda name, default: options.sizes(name, default, MOST_LAYERS)  # noqa: E731
    fields = read_fields(options, FIELDS)
    fields |= dict(
        sample_size=options.sizes("sample_size", None),
        channels=channels,
        layers=each("layers_per_block", 2, sizes),
        num_heads=each("attention_head_dim", 8, options.sizes),
        only_cross=_flags(options, values, count),
        scale_shift=options.only("resnet_time_scale_shift", "default", "scale_shift") == "scale_shift",
        text_sizes=_nested(options, what, values, "cross_attention_dim", 1280, count, MOST_CHANNELS, null=True),
        depths=_nested(options, what, values, "transformer_layers_per_block", 1, count, MOST_LAYERS),
        down_blocks=options.texts("down_block_types", (*DOWN[:1] * 3, DOWN[1])),
        up_blocks=options.texts("up_block_types", (UP[1], *UP[:1] * 3)),
        mid_block=options.text("mid_block_type", None if "mid_block_type" in values else MID[0]),
    )
    if fields["sample_size"] is not None and len(fields["sample_size"]) not in (1, 2):
        raise ConfigError(f"{what}: sample_size={values['sample_size']}", "a side, or height and width", "restore it")
    fields["text_sizes"] = tuple(each if isinstance(each, tuple) else (each,) for each in fields["text_sizes"])
    kind = options.only("class_embed_type", None, "timestep", "identity", "projection", "simple_projection")
    if kind is None and "num_class_embeds" in options:
        fields |= dict(class_embedding="index", class_size=options.size("num_class_embeds"))
    else:
        options.only("num_class_embeds", None)
        vectors = kind in ("projection", "simple_projection")
        option = "projection_class_embeddings_input_dim"
        fields |= dict(class_embedding=kind, class_size=options.size(option) if vectors else options.only(option, None))
    return options, fields


def _flags(options: ConfigOptions, values: dict, count: int) -> tuple[bool, ...]:
    """Returns only_cross_attention of each block."""
    given = values.get("only_cross_attention", False)
    if isinstance(given, list) and all(isinstance(each, bool) for each in given):
        options.skip("only_cross_attention")
        return tuple(given)
    return (options.flag("only_cross_attention", False),) * count


def _nested(
    options: ConfigOptions, what: str, values: dict, name: str, default: int, count: int, most: int, null: bool = False
) -> tuple:
    """Returns an option that is a number, or for each block a number or a list of numbers.

    Args:
        null: whether a list may contain null.
    """
    options.skip(name)
    given = values.get(name, default)

    def fits(value: Any) -> bool:
        return (is_whole(value) and 0 <= value <= most and (value or not null)) or (null and value is None)

    blocks = [given] * count if is_whole(given) else given
    lists = [each if isinstance(each, list) else [each] for each in blocks] if isinstance(blocks, list) else [[""]]
    if not all(map(fits, (value for each in lists for value in each))) or not all(lists):
        raise ConfigError(
            f"{what}: {name}={given!r:.100}",
            f"a whole number up to {most:,}, or for each block one or a list of them",
            "restore it from its origin",
        )
    return tuple(tuple(each) if isinstance(each, list) else each for each in blocks)


def from_hf_config(values: dict) -> UNetConfig:
    """Reads config.json of UNet2DConditionModel; every option is honoured or refused by name."""
    what = "config.json of UNet2DConditionModel"
    options, fields = read_options(values, what, _FIXED)
    options.skip("addition_embed_type_num_heads")  # of an addition_embed_type
    fields |= read_fields(options, _CENTER)
    reverse, count = "reverse_transformer_layers_per_block", len(fields["channels"])
    if reverse in options:
        fields["up_depths"] = _nested(options, what, values, reverse, 1, count, MOST_LAYERS)
    elif not all(isinstance(each, int) for each in fields["depths"]):
        raise ConfigError(
            f"{what}: transformer_layers_per_block={values['transformer_layers_per_block']!r:.100}",
            f"with lists in it, {reverse} too: the way up has one more residual block",
            "restore it from its origin",
        )
    options.done()
    return make_config(UNetConfig, **fields)


def _one_or_each(values: tuple) -> Any:
    """Returns a value for all blocks, or a list with one for each."""
    plain = [list(each) if isinstance(each, tuple) else each for each in values]
    return plain[0] if len(set(values)) == 1 and not isinstance(plain[0], list) else plain


def written_options(config: UNetConfig) -> dict[str, Any]:
    """Returns the options that all families have in common, by name."""
    c, d = config, config.dialect
    # A width alone in its list is written as the number.
    texts = tuple(sizes[0] if len(sizes) == 1 and sizes[0] else sizes for sizes in c.text_sizes)
    indices = d.class_embedding == "index"
    return kind_of(c.family) | write_fields(c, FIELDS) | dict(
        sample_size=None if c.sample_size is None else one_or_several(c.sample_size),
        block_out_channels=list(c.channels),
        layers_per_block=_one_or_each(c.layers),
        attention_head_dim=_one_or_each(c.num_heads),
        only_cross_attention=_one_or_each(d.only_cross),
        resnet_time_scale_shift="scale_shift" if d.scale_shift else "default",
        cross_attention_dim=_one_or_each(texts),
        transformer_layers_per_block=_one_or_each(c.depths),
        down_block_types=list(c.down_blocks),
        up_block_types=list(c.up_blocks),
        mid_block_type=c.mid_block,
        class_embed_type=None if indices else d.class_embedding,
        num_class_embeds=c.class_size if indices else None,
        projection_class_embeddings_input_dim=None if indices else c.class_size,
    )  # fmt: skip


def to_hf_config(config: UNetConfig) -> dict:
    """Returns config.json, the inverse of `from_hf_config`. Raises ConfigError: switches without an option."""
    up = None if config.up_depths is None else [
        list(each) if isinstance(each, tuple) else each for each in config.up_depths
    ]  # fmt: skip
    written = written_options(config) | write_fields(config, _CENTER)
    return check_written(config, written | dict(reverse_transformer_layers_per_block=up), from_hf_config, "a UNet")


# ---- tensors


def table(config: UNetConfig) -> Table:
    """Returns the table of the weights under diffusers' names."""
    c, d = config, config.dialect
    weights = conv2d("conv_in", "conv_in") + norm("conv_norm_out", "norm_out") + conv2d("conv_out", "conv_out")
    weights += two_linear("time_embedding", "time_embedding")
    if c.condition_size is not None:
        weights += linear("time_embedding.cond_proj", "time_embedding/condition", bias=False)
    if d.class_embedding == "index":
        weights.append(Weight("class_embedding.weight", "class_embedding/embedding"))
    elif d.class_embedding in ("timestep", "projection"):
        weights += two_linear("class_embedding", "class_embedding")
    elif d.class_embedding == "simple_projection":
        weights += linear("class_embedding", "class_embedding")
    for block, name, path in named_blocks(c):
        weights += _block(c, block, name, path)
    return Table(tuple(weights))


def named_blocks(config: UNetConfig) -> Iterator[tuple[UNetBlock, str, str]]:
    """Yields each block with its name in folders and its path."""
    yield from ((block, f"down_blocks.{i}", f"down_{i}") for i, block in enumerate(config.down))
    if config.mid is not None:
        yield config.mid, "mid_block", "mid"
    yield from ((block, f"up_blocks.{i}", f"up_{i}") for i, block in enumerate(config.up))


def attending_layers(block: UNetBlock, path: str) -> int:
    """Returns the number of residual blocks that transformers follow."""
    return len(block.inputs) - (path == "mid") if block.depths else 0


def two_linear(name: str, path: str) -> list[Weight]:
    """Returns the weights of a `TimeEmbedding` without a further vector."""
    return linear(f"{name}.linear_1", f"{path}/linear_1") + linear(f"{name}.linear_2", f"{path}/linear_2")


def _block(c: UNetConfig, block: UNetBlock, name: str, path: str) -> list[Weight]:
    weights: list[Weight] = []
    for i, inputs in enumerate(block.inputs):
        hub, ours = f"{name}.resnets.{i}", f"{path}/resnet_{i}"
        weights += norm(f"{hub}.norm1", f"{ours}/norm_1") + conv2d(f"{hub}.conv1", f"{ours}/conv_1")
        weights += linear(f"{hub}.time_emb_proj", f"{ours}/time")
        weights += norm(f"{hub}.norm2", f"{ours}/norm_2") + conv2d(f"{hub}.conv2", f"{ours}/conv_2")
        if inputs != block.channels:
            weights += conv2d(f"{hub}.conv_shortcut", f"{ours}/shortcut")
    for i in range(attending_layers(block, path) * len(block.texts)):
        depth = block.depths[i // len(block.texts)]
        heads, hub, ours = (block.num_heads, block.head_dim), f"{name}.attentions.{i}", f"{path}/transformer_{i}"
        weights += transformer(heads, depth, hub, ours, c.dialect.linear_projection)
    if block.resample:
        resamplers = "downsamplers" if path.startswith("down") else "upsamplers"
        weights += conv2d(f"{name}.{resamplers}.0.conv", f"{path}/resample")
    return weights


def transformer(heads: tuple[int, int], depth: int, name: str, path: str, linear_projection: bool) -> list[Weight]:
    """Returns the weights of one `Transformer`.

    Args:
        heads: their number and their width.
    """
    num_heads, head_dim = heads
    inner = num_heads * head_dim
    project = "o i -> i o" if linear_projection else "o i 1 1 -> i o"
    weights = norm(f"{name}.norm", f"{path}/norm")
    weights += linear(f"{name}.proj_in", f"{path}/project_in", project)
    for i in range(depth):
        hub, ours = f"{name}.transformer_blocks.{i}", f"{path}/layer_{i}"
        for j in (1, 2, 3):
            weights += norm(f"{hub}.norm{j}", f"{ours}/norm_{j}")
        for j in (1, 2):
            names = [f"{hub}.attn{j}.to_{letter}" for letter in "qkv"]
            weights += into_heads(names, f"{ours}/attention_{j}", head_dim, (inner,) * 3, biased="")
            out = f"{hub}.attn{j}.to_out.0"
            weights += linear(out, f"{ours}/attention_{j}/out", "e (n h) -> n h e", {"h": head_dim})
        gated = f"{hub}.ff.net.0.proj"  # the values, then their gates
        parts = [(f"{ours}/mlp/up", 4 * inner), (f"{ours}/mlp/gate", 4 * inner)]
        weights += beside([(f"{gated}.weight", f"{each}/kernel", rows) for each, rows in parts], "o i -> i o")
        weights += beside([(f"{gated}.bias", f"{each}/bias", rows) for each, rows in parts])
        weights += linear(f"{hub}.ff.net.2", f"{ours}/mlp/down")
    return weights + linear(f"{name}.proj_out", f"{path}/project_out", project)


def sample(config: UNetConfig) -> tuple:
    """Returns arguments with which `init` creates every parameter."""
    latents, timesteps, *more = sample_inputs(config)
    text = jnp.zeros((1, 1, config.text_widths[0] or 1))
    return latents, timesteps, text, None, *more


def sample_inputs(config: UNetConfig) -> tuple:
    """Returns latents, timesteps, class_labels and timestep_cond of one row."""
    c, kind = config, config.dialect.class_embedding
    side = 2 ** len(c.channels) * 2
    sizes = {"identity": (1, c.time_width), "projection": (1, c.class_size), "simple_projection": (1, c.class_size)}
    labels = None if kind is None else jnp.zeros(sizes.get(kind, (1,)), jnp.float32 if kind in sizes else jnp.int32)
    condition = None if c.condition_size is None else jnp.zeros((1, c.condition_size))
    return jnp.zeros((1, side, side, c.in_channels)), jnp.zeros((1,), jnp.int32), labels, condition


FAMILIES = (
    Family(
        name="Stable Diffusion's UNet",
        architectures=("UNet2DConditionModel",),
        from_hf=from_hf_config,
        to_hf=to_hf_config,
        table=table,
        sample=sample,
        oracle="diffusers UNet2DConditionModel",
    ),
)
