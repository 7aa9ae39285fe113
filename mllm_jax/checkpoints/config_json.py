"""Shared reading and writing of config.json files: common fields, grids, and the check of a written config."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from operator import attrgetter
from typing import Any, TypeVar

from mllm_jax.checkpoints.config_options import ENCODER_ACTIVATIONS, LARGEST, ConfigOptions
from mllm_jax.checkpoints.fields import field_path, field_value, field_values
from mllm_jax.errors import ConfigError

Config = TypeVar("Config")

RATIOS = (1 / 64, 1024)  # limits of an MLP's width over the hidden size
MOST_PIXELS = 16_384  # along a side of an image, far more than any encoder was trained on
MOST_PATCHES = 2_048  # along a side of an image
# Options of a text model or a larger model that encoders' config.json files list, without effect on the encoder.
ELSEWHERE = ("bos_token_id", "eos_token_id", "pad_token_id", "projection_dim", "tie_word_embeddings")
# Fields for initialising and running a module, which no checkpoint stores.
NOT_STORED = ("mimetic_init", "compute")


def write_activation(activation: str) -> str:
    """Returns the hub's name of an activation."""
    return next(theirs for theirs, ours in ENCODER_ACTIVATIONS.items() if ours == activation)


def read_square(options: ConfigOptions, name: str, most: int = LARGEST) -> int:
    """Returns the side that an option gives as one size or two equal ones. Raises ConfigError if it is no square."""
    sides = options.sizes(name, most=most)
    if len(sides) not in (1, 2) or len(set(sides)) != 1:
        raise ConfigError(
            f"{name}={list(sides)}",
            "a square: the position table is a square grid",
            "convert another checkpoint",
        )
    return sides[0]


def read_grid(options: ConfigOptions, image: str = "image_size", patch: str = "patch_size") -> dict[str, int]:
    """Returns image_size and patch_size of an image encoder. Raises ConfigError for no squares or no patches."""
    sizes = dict(image_size=read_square(options, image, MOST_PIXELS), patch_size=read_square(options, patch))
    if not 0 < sizes["image_size"] // sizes["patch_size"] <= MOST_PATCHES:
        raise ConfigError(
            f"{image}={sizes['image_size']} with {patch}={sizes['patch_size']}",
            f"1 to {MOST_PATCHES:,} patches along a side",
            "restore config.json from its origin",
        )
    return sizes


def one_or_several(ids: tuple[int, ...]) -> int | list[int]:
    """Returns the value of an option that holds one id or a list of them."""
    return ids[0] if len(ids) == 1 else list(ids)


# How an option of a kind is written, if it differs from the field's value.
_WRITTEN: dict[str, Callable[[Any], Any]] = {
    "activation": write_activation,
    "counts": list,
    "sizes": list,
    "several_sizes": lambda lists: [list(sizes) for sizes in lists],
    "numbers": lambda numbers: None if numbers is None else list(numbers),
    "ids": lambda ids: one_or_several(ids) if ids else None,
}
# Options for one field of a config or of its dialect each: the field -> (the option, the method of `ConfigOptions` that
# reads it, and the method's arguments after the name).
Fields = Mapping[str, tuple[Any, ...]]

# The fields that most transformers have under these names.
LAYERS: Fields = {
    "hidden_size": ("hidden_size", "size"),
    "num_layers": ("num_hidden_layers", "size"),
    "num_heads": ("num_attention_heads", "size"),
}


def read_fields(options: ConfigOptions, fields: Fields) -> dict[str, Any]:
    """Reads the fields by name; raises what the methods of `ConfigOptions` raise."""
    return {field: getattr(options, kind)(name, *more) for field, (name, kind, *more) in fields.items()}


def write_fields(config: Any, fields: Fields) -> dict[str, Any]:
    """Returns the options by name: the inverse of `read_fields`."""
    paths = {name: (kind, attrgetter(field_path(config, field))) for field, (name, kind, *_) in fields.items()}
    values = {name: (kind, read(config)) for name, (kind, read) in paths.items()}
    return {name: _WRITTEN.get(kind, lambda value: value)(value) for name, (kind, value) in values.items()}


def stored_fields(config: Any, *without: str) -> dict[str, Any]:
    """Returns the fields that a checkpoint has to store: all but those for running the module and those named."""
    return {name: value for name, value in field_values(config).items() if name not in (*NOT_STORED, *without)}


def check_written(
    config: Config,
    written: dict,
    read: Callable[[dict], Config],
    what: str,
    facts: Callable[[Config], Mapping[str, Any]] = stored_fields,
) -> dict:
    """Returns `written` if reading it gives the same config again.

    Args:
        read: the family's `from_hf`.
        what: kind of model, such as "a decoder".
        facts: config -> {field: effective value}, which must be equal before and after.

    Raises:
        ConfigError: switches for which the family has no options; names them.
    """
    wanted, found = facts(config), facts(read(written))
    lost = [f"{field_path(config, n)}={field_value(config, n, wanted[n])!r}" for n in wanted if wanted[n] != found[n]]
    if lost:
        raise ConfigError(
            f"{what} with {', '.join(lost)}, to be written as {config.family}",
            f"switches that {config.family} has",
            "choose another family, or change these",
        )
    return written
