"""The common parts of the ViTs' Hugging Face folders: their options, read and written, and their weights' names."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from mllm_jax.checkpoints.architectures import kind_of
from mllm_jax.checkpoints.config_json import (
    ELSEWHERE,
    LAYERS,
    Fields,
    check_written,
    read_fields,
    read_grid,
    stored_fields,
    write_fields,
)
from mllm_jax.checkpoints.config_options import ENCODER_ACTIVATIONS, ConfigOptions, named_as
from mllm_jax.checkpoints.fields import make_config
from mllm_jax.checkpoints.table import (
    HEAD_BIAS,
    LINEAR,
    OUT_OF_HEADS,
    Family,
    Table,
    Weight,
    beside,
    image_sample,
    into_heads,
    linear,
    norm,
)
from mllm_jax.encoders.vit import ViTConfig
from mllm_jax.errors import ConfigError

_GRID = {"image_size": ("image_size", "size"), "patch_size": ("patch_size", "size")}
_FIELDS: Fields = LAYERS | {
    "mlp_size": ("intermediate_size", "size"),
    "activation": ("hidden_act", "activation", ENCODER_ACTIVATIONS),
    "norm_eps": ("layer_norm_eps", "number", ..., 0.0),
    "num_channels": ("num_channels", "size", 3),
}
# Defaults of the options that config.json leaves out, if the family has no others.
_DEFAULTS = write_fields(ViTConfig(), _GRID | _FIELDS)


def options_of(values: Mapping, defaults: Mapping, family: str) -> ConfigOptions:
    """Returns the options of a config.json, or of its part for the image encoder, with the defaults of absent ones.

    Raises:
        ConfigError: it names another architecture.
    """
    named, _ = named_as(values)
    if named and family not in named:
        raise ConfigError(
            f"a config.json with architectures={list(named)}",
            family,
            "read it with the family of its architecture: mllm_jax.supported_models()",
        )
    return ConfigOptions({**defaults, **{k: v for k, v in values.items() if v is not None}}, f"config.json of {family}")


def read_vit(options: ConfigOptions, **switches) -> ViTConfig:
    """Reads the options that the families have in common; refuses those that nothing has read.

    Args:
        switches: fields of the config or of its dialect that the family determines.
    """
    fields = {name: field for name, field in _FIELDS.items() if name not in switches}
    read = read_grid(options) | dict(drop_remainder=True) | read_fields(options, fields)
    config = make_config(ViTConfig, **read | switches)
    options.skip(*ELSEWHERE)
    options.done()
    return config


def write_vit(c: ViTConfig) -> dict:
    """Writes the options of a ViT, the inverse of `read_vit`."""
    return dict(**kind_of(c.family), **write_fields(c, _GRID | _FIELDS))


def faithful(c: ViTConfig, written: dict, read: Callable[[dict], ViTConfig]) -> dict:
    """Returns `written`, if reading it gives the same encoder.

    Raises:
        ConfigError: some fields cannot be expressed in the family's options; names them.
    """
    return check_written(c, written, read, "a ViT", _facts)


def _facts(c: ViTConfig) -> dict:
    """Returns the stored fields, without those of the image's preparation, which config.json does not have."""
    pooler = {"auto": "token" if c.class_token else "mean"}.get(c.dialect.pooler, c.dialect.pooler)
    return stored_fields(c, "image_mean", "image_std", "drop_remainder", "region_size") | dict(pooler=pooler)


@dataclass(frozen=True)
class ViTNames:
    """The hub's names of a ViT's tensors; q, k and v, or gate and up, have one name if one tensor fuses them.

    Attributes:
        q_bias, v_bias: full names of biases that are not named after their matrix with ".bias".
        token_axes, position_axes: the axes of the hub's tensors: "e", "1 e" or "1 1 e"; "n e" or "1 n e".
        attention_scale, mlp_scale: full names of the layer scales.
        head: the linear map after the pooling.
        pooler: prefix of the names of an attention pooling.
    """

    patch: str
    layers: str
    class_token: str = ""
    position: str = "embeddings.position_embedding.weight"
    token_axes: str = "1 1 e"
    position_axes: str = "1 n e"
    pre_norm: str = ""
    attention_norm: str = "layer_norm1"
    q: str = "self_attn.q_proj"
    k: str = "self_attn.k_proj"
    v: str = "self_attn.v_proj"
    q_bias: str = ""
    v_bias: str = ""
    q_norm: str = ""
    k_norm: str = ""
    attention_sub_norm: str = ""
    out: str = "self_attn.out_proj"
    attention_scale: str = ""
    mlp_norm: str = "layer_norm2"
    gate: str = ""
    up: str = "mlp.fc1"
    mlp_sub_norm: str = ""
    down: str = "mlp.fc2"
    mlp_scale: str = ""
    final_norm: str = "post_layernorm"
    head: str = ""
    pooler: str = ""
    spellings: tuple[tuple[str, str], ...] = ()
    ignored: tuple[str, ...] = ()


def vit_table(c: ViTConfig, names: ViTNames) -> Table:
    """Returns the table of a ViT's weights under a family's names."""
    dialect = c.dialect
    width, head = c.hidden_size, {"h": c.hidden_size // c.num_heads}
    hub, layernorm = f"{names.layers}.{{layer}}.", dialect.norm == "layer"
    patch = {"p": c.patch_size, "q": c.patch_size, "c": c.num_channels}
    weights = linear(names.patch, "patch_embedding/projection", "e c p q -> (p q c) e", patch, bias=dialect.patch_bias)
    if c.class_token:
        weights.append(Weight(names.class_token, "class_token", f"{names.token_axes} -> 1 e"))
    weights.append(Weight(names.position, "position_embedding", f"{names.position_axes} -> n e"))
    if dialect.pre_norm:
        weights += norm(names.pre_norm, "pre_norm", bias=layernorm)
    weights += norm(hub + names.attention_norm, "layers/attention_norm", bias=layernorm)
    own_biases = dialect.qkv_bias and names.q_bias
    biased = "" if own_biases or not dialect.qkv_bias else "qkv" if dialect.k_bias else "qv"
    stored = [hub + name for name in (names.q, names.k, names.v)]
    weights += into_heads(stored, "layers/attention", head["h"], (width,) * 3, biased)
    if own_biases:
        for part, name in (("q", names.q_bias), ("v", names.v_bias)):
            weights.append(Weight(hub + name, f"layers/attention/{part}/bias", HEAD_BIAS, head))
    if dialect.qk_norm:
        weights += norm(hub + names.q_norm, "layers/attention/q_norm", bias=False)
        weights += norm(hub + names.k_norm, "layers/attention/k_norm", bias=False)
    if dialect.attention_sub_norm_eps is not None:
        weights += norm(hub + names.attention_sub_norm, "layers/attention/norm")
    weights += linear(hub + names.out, "layers/attention/out", OUT_OF_HEADS, head)
    weights += norm(hub + names.mlp_norm, "layers/mlp_norm", bias=layernorm)
    wide = [("gate", names.gate)] * dialect.gated + [("up", names.up)]
    weights += beside([(f"{hub}{name}.weight", f"layers/mlp/{part}/kernel", c.mlp_size) for part, name in wide], LINEAR)
    weights += beside([(f"{hub}{name}.bias", f"layers/mlp/{part}/bias", c.mlp_size) for part, name in wide])
    if dialect.mlp_sub_norm_eps is not None:
        weights += norm(hub + names.mlp_sub_norm, "layers/mlp/norm")
    weights += linear(hub + names.down, "layers/mlp/down")
    if dialect.layer_scale is not None:
        weights.append(Weight(hub + names.attention_scale, "layers/attention_scale"))
        weights.append(Weight(hub + names.mlp_scale, "layers/mlp_scale"))
    if dialect.norm_output or dialect.norm_pooled:
        weights += norm(names.final_norm, "final_norm")
    if dialect.pooler == "attention":
        weights.append(Weight(f"{names.pooler}.probe", "pooler/probe", "1 1 e -> 1 e"))
        stored = (f"{names.pooler}.attention.in_proj",) * 3
        weights += into_heads(stored, "pooler", head["h"], (width,) * 3, joint="_")
        weights += linear(f"{names.pooler}.attention.out_proj", "pooler/out", OUT_OF_HEADS, head)
        weights += norm(f"{names.pooler}.layernorm", "pooler/norm")
        weights += linear(f"{names.pooler}.mlp.fc1", "pooler/mlp/up")
        weights += linear(f"{names.pooler}.mlp.fc2", "pooler/mlp/down")
    if dialect.head_size is not None:
        weights += linear(names.head, "head")
    return Table(tuple(weights), names.spellings, names.ignored)


def vit_family(
    architecture: str,
    *,
    name: str,
    oracle: str = "",
    defaults: Mapping[str, Any],
    names: ViTNames,
    fields: Fields = {},  # noqa: B006
    read: Callable[[ConfigOptions], dict] = lambda options: {},
    write: Callable[[ViTConfig], dict] = lambda config: {},
    **fixed: Any,
) -> Family:
    """Returns the family of a ViT of transformers; every option of its config.json is honoured or refused by name.

    Args:
        defaults: of options that config.json leaves out, if they differ from those of `ViTConfig`.
        names: of its tensors.
        fields: options that only this family has.
        read, write: functions that read other fields from the options, and write other options; None is not written.
        fixed: fields of the config or of its dialect that are the same in all its models.
    """

    def from_hf(values: Mapping) -> ViTConfig:
        options = options_of(values, _DEFAULTS | dict(defaults), architecture)
        return read_vit(options, family=architecture, **fixed | read_fields(options, fields) | read(options))

    def to_hf(config: ViTConfig) -> dict:
        written = write_vit(config) | write_fields(config, fields) | write(config)
        return faithful(config, {name: value for name, value in written.items() if value is not None}, from_hf)

    return Family(
        name=name,
        architectures=(architecture,),
        from_hf=from_hf,
        to_hf=to_hf,
        table=lambda config: vit_table(config, names),
        sample=image_sample,
        oracle=oracle,
    )
