"""NFNet's folders, in timm's format: `dm_nfnet_f*` with its authors' weights, `nfnet_f*` with timm's."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp

from mllm_jax.checkpoints.config_json import Fields, check_written, read_fields, write_fields
from mllm_jax.checkpoints.config_options import ConfigOptions
from mllm_jax.checkpoints.fields import make_config
from mllm_jax.checkpoints.table import Family, Table, Weight, linear
from mllm_jax.encoders.nfnet import VARIANTS, NFNetConfig, NFNetDialect, NFNetInput, nfnet, round_to
from mllm_jax.errors import ConfigError

_FIELDS: Fields = {
    "alpha": ("alpha", "number", NFNetDialect.alpha),
    "bottleneck": ("bottle_ratio", "number", NFNetDialect.bottleneck),
    "channel_divisor": ("ch_div", "size", NFNetDialect.channel_divisor),
    "se_gain": ("attn_gain", "number", NFNetDialect.se_gain),
    "activation": ("act_layer", "text", NFNetConfig.activation),
    "gamma_in_act": ("gamma_in_act", "flag", NFNetDialect.gamma_in_act),
    "same_padding": ("same_padding", "flag", NFNetDialect.same_padding),
    "skip_init": ("skipinit", "flag", NFNetDialect.skip_init),
    "std_eps": ("std_conv_eps", "number", NFNetDialect.std_eps),
    "in_channels": ("in_chans", "size", NFNetConfig.in_channels),
    "num_classes": ("num_classes", "count", NFNetConfig.num_classes),
}
# Options with one supported value.
_FIXED = dict(stem_type="deep_quad", attn_layer="se", extra_conv=True, reg=False, width_factor=1.0)
_FIXED |= dict(output_stride=32, global_pool="avg")
_INPUT = dict(mean="numbers", std="numbers", interpolation="text", crop_pct="number", test_crop_pct="number")
_INPUT |= dict(crop_mode="text")
MOST_BLOCKS = 1_000  # of a stage; blocks are not scanned


def _timm_options(architecture: str) -> dict[str, Any]:
    """Returns the options of a model that timm names."""
    config = nfnet(architecture.rpartition("_")[2].upper())
    switches = dict.fromkeys(("gamma_in_act", "same_padding", "skipinit"), architecture.startswith("dm_"))
    return switches | dict(
        depths=config.depths,
        channels=config.widths,
        stem_chs=config.stem_sizes[-1],
        group_size=128,
        num_features=config.final_size,
        attn_kwargs=dict(rd_ratio=0.5),
    )


def from_hf_config(values: dict) -> NFNetConfig:
    """Reads timm's config.json; every option is honoured or refused by name.

    Raises:
        ConfigError: another architecture, an unsupported option, or an incomplete file.
    """
    options = ConfigOptions(values, "timm's config.json")
    architecture = options.only("architecture", *ARCHITECTURES)
    pretrained = ConfigOptions(options.part("pretrained_cfg", {}), "pretrained_cfg in timm's config.json")
    defaults = NFNetConfig()
    given = options.part("model_args", {})
    classes = options.count("num_classes", pretrained.count("num_classes", 1000))
    model = ConfigOptions(
        dict(num_classes=classes, ch_div=8) | _timm_options(architecture) | given,
        f"model_args of {architecture} in timm's config.json",
    )
    for name, value in _FIXED.items():
        model.only(name, value)
    # Options of training and initialisation.
    model.skip("drop_rate", "drop_path_rate", "zero_init_fc")
    se = ConfigOptions(model.part("attn_kwargs"), f"attn_kwargs of {architecture} in timm's config.json")
    divisor = model.size("ch_div")
    widths = tuple(round_to(width, divisor) for width in model.sizes("channels"))
    stem = round_to(model.size("stem_chs"), divisor)
    size = _pixels(pretrained, "input_size", (3, *defaults.input.size))
    test_size = _pixels(pretrained, "test_input_size", None)
    images = {name: getattr(pretrained, kind)(name, getattr(defaults.input, name)) for name, kind in _INPUT.items()}
    groups, final = model.size("group_size"), model.count("num_features")
    config = make_config(
        NFNetConfig,
        depths=model.sizes("depths", most=MOST_BLOCKS),
        widths=widths,
        group_sizes=(groups,) * len(widths),
        stem_sizes=(stem // 8, stem // 4, stem // 2, stem),
        se_ratio=se.number("rd_ratio", 1 / 16, least=0.0, most=64.0),
        se_divisor=se.size("rd_divisor", 8),
        final_size=final and round_to(final, divisor),
        input=NFNetInput(
            size=size[1:],
            test_size=None if test_size is None else test_size[1:],
            **images,
        ),
        family=architecture,
        **read_fields(model, _FIELDS),
    )
    se.done()
    model.done()
    options.only("global_pool", "avg")
    # Labels, origins, and options that follow from the others.
    options.skip("num_features", "label_names", "label_descriptions", "license")
    options.done()
    return config


def _pixels(options: ConfigOptions, name: str, default: tuple[int, ...] | None) -> tuple[int, ...] | None:
    """Reads channels, height and width. Raises ConfigError: not three sizes."""
    sizes = options.sizes(name, default)
    if sizes is not None and len(sizes) != 3:
        raise ConfigError(f"{name}={list(sizes)}", "channels, height and width", "restore it from its origin")
    return sizes


def to_hf_config(config: NFNetConfig) -> dict:
    """Returns config.json, which timm opens as `local-dir:FOLDER`; `model_args` has what the name does not determine.

    Raises:
        ConfigError: switches that timm does not have, such as those of the Haiku code.
    """
    c, dialect = config, config.dialect
    se = dict(rd_ratio=dialect.se_ratio) | ({} if dialect.se_divisor == 8 else dict(rd_divisor=dialect.se_divisor))
    full = dict(
        depths=c.depths,
        channels=c.widths,
        stem_chs=c.stem_sizes[-1],
        group_size=c.group_sizes[0],
        num_features=c.final_size,
        attn_kwargs=se,
        **write_fields(c, _FIELDS),
    )
    plain = write_fields(NFNetConfig(), _FIELDS) | dict(num_classes=c.num_classes) | _timm_options(c.family)
    model_args = {name: value for name, value in full.items() if value != plain[name]}
    images = {name: value for name in _INPUT if (value := getattr(c.input, name)) is not None}
    images["input_size"] = (c.in_channels, *c.input.size)
    if c.input.test_size is not None:
        images["test_input_size"] = (c.in_channels, *c.input.test_size)
    written = dict(
        architecture=c.family,
        num_classes=c.num_classes,
        num_features=c.final_size,
        global_pool="avg",
        pretrained_cfg=images | dict(num_classes=c.num_classes, first_conv="stem.conv1", classifier="head.fc"),
    )
    if model_args:
        written["model_args"] = model_args
    if c.activation == "gelu_tanh":
        raise ConfigError(
            f"an NFNet with activation='gelu_tanh', to be written as {c.family}",
            "an activation that timm's NormFreeNet has",
            "save a training checkpoint instead, or change it",
        )
    return check_written(c, written, from_hf_config, "an NFNet")


def table(config: NFNetConfig) -> Table:
    """Returns the table of the weights under timm's names."""
    weights: list[Weight] = []

    def conv(name: str, path: str):
        weights.append(Weight(f"{name}.weight", f"{path}/kernel", "o i h w -> h w i o"))
        weights.append(Weight(f"{name}.gain", f"{path}/gain", "o 1 1 1 -> o"))
        weights.append(Weight(f"{name}.bias", f"{path}/bias"))

    for i in range(len(config.stem_sizes)):
        conv(f"stem.conv{i + 1}", f"stem_{i}")
    before = config.stem_sizes[-1]
    for stage, depth in enumerate(config.depths):
        for i in range(depth):
            name, path = f"stages.{stage}.{i}", f"stages_{stage}_{i}"
            if i == 0 and (stage or before != config.widths[0]):
                conv(f"{name}.downsample.conv", f"{path}/shortcut")
            for theirs, ours in (("conv1", "conv_1"), ("conv2", "conv_2"), ("conv2b", "conv_3"), ("conv3", "conv_4")):
                conv(f"{name}.{theirs}", f"{path}/{ours}")
            weights += linear(f"{name}.attn_last.fc1", f"{path}/squeeze_excite/down", "o i 1 1 -> i o")
            weights += linear(f"{name}.attn_last.fc2", f"{path}/squeeze_excite/up", "o i 1 1 -> i o")
            if config.dialect.skip_init:
                # timm stores a scalar; here it has one axis.
                weights.append(Weight(f"{name}.skipinit_gain", f"{path}/skip_gain", " -> 1"))
    conv("final_conv", "final_conv")
    if config.num_classes:
        weights += linear("head.fc", "head")
    return Table(tuple(weights))


def sample(config: NFNetConfig) -> tuple:
    """Returns arguments with which `init` creates every parameter."""
    return (jnp.zeros((1, 32, 32, config.in_channels), jnp.float32),)


ARCHITECTURES = tuple(f"{origin}nfnet_{variant.lower()}" for origin in ("dm_", "") for variant in VARIANTS)
FAMILIES = (
    Family(
        name="NFNet",
        architectures=ARCHITECTURES,
        from_hf=from_hf_config,
        to_hf=to_hf_config,
        table=table,
        sample=sample,
        oracle="timm NormFreeNet",
    ),
)
