"""The table of a model family for the checkpoint engine: which stored tensor is which parameter, both ways."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import jax.numpy as jnp


@dataclass(frozen=True)
class Weight:
    """One parameter and its stored tensor, or its part of one.

    Attributes:
        name: the hub's name. "{layer}" in it counts 0, 1, ...: these tensors are stacked along a new first axis.
            If layers repeat in groups of two, "{layer*2+0}" counts 0, 2, ... and "{layer*2+1}" counts 1, 3, ...
        path: path of the parameter in the tree, such as "layers/attention/q/kernel".
        pattern: einops pattern from the stored axes to the parameter's, without the layer axis: "(n h) e -> e n h". Its
            inverse is used for writing. Empty: unchanged.
        sizes: sizes of axes that einops cannot infer.
        rows: (start, stop) on the stored tensor's first axis, if one tensor holds several parameters one after the
            other; the lines of one name must cover it.
        part: index on the first axis of the result of `pattern`, if several parameters are interleaved in one tensor:
            "(n p h) e -> p e n h" and parts 0, 1, 2.
    """

    name: str
    path: str
    pattern: str = ""
    sizes: Mapping[str, int] = field(default_factory=dict)
    rows: tuple[int, int] | None = None
    part: int | None = None


@dataclass(frozen=True)
class Table:
    """All parameters of a model.

    Attributes:
        spellings: (regular expression, replacement) pairs that turn other spellings of names into the hub's, applied in
            order to every stored name.
        ignored: names, with "{layer}" or not, that may be stored but are no parameters, such as RoPE's frequencies or a
            head that is tied to the embedding.
    """

    weights: tuple[Weight, ...]
    spellings: tuple[tuple[str, str], ...] = ()
    ignored: tuple[str, ...] = ()


def batch_sample(config: Any) -> tuple:
    """Returns a batch, for a whole model that makes one itself."""
    return (config.batch_spec().empty(),)


def token_sample(config: Any) -> tuple:
    """Returns one token, int32[1, 1], for a language model or a text encoder."""
    return (jnp.zeros((1, 1), jnp.int32),)


def image_sample(config: Any) -> tuple:
    """Returns one image of the encoder's size, float32[1, side, side, channels]."""
    return (jnp.zeros((1, config.image_size, config.image_size, config.num_channels)),)


# From the stored axes to the parameter's: a matrix, a matrix to heads and its bias, a matrix from heads.
LINEAR, INTO_HEADS, HEAD_BIAS, OUT_OF_HEADS = "o i -> i o", "(n h) e -> e n h", "(n h) -> n h", "e (n h) -> n h e"


def linear(
    name: str, path: str, pattern: str = LINEAR, sizes: Mapping[str, int] = {}, *, bias: bool = True
) -> list[Weight]:
    """Returns the weights of a linear map or a convolution: its kernel and, if it has one, its bias."""
    kernel = Weight(f"{name}.weight", f"{path}/kernel", pattern, sizes)
    return [kernel, Weight(f"{name}.bias", f"{path}/bias")] if bias else [kernel]


def norm(name: str, path: str, *, bias: bool = True) -> list[Weight]:
    """Returns the weights of a norm: its scale and, if it has one, its bias."""
    scale = Weight(f"{name}.weight", f"{path}/scale")
    return [scale, Weight(f"{name}.bias", f"{path}/bias")] if bias else [scale]


def beside(parts: Sequence[tuple[str, str, int]], pattern: str = "", sizes: Mapping[str, int] = {}) -> list[Weight]:
    """Returns parameters by (stored name, path, rows); those of one name are one after the other in that tensor."""
    names, lines, start = [name for name, _, _ in parts], [], 0
    for name, path, rows in parts:
        lines.append(Weight(name, path, pattern, sizes, (start, start + rows) if names.count(name) > 1 else None))
        start += rows
    return lines


def into_heads(
    names: Sequence[str], path: str, head_dim: int, rows: Sequence[int], biased: str = "qkv", joint: str = "."
) -> list[Weight]:
    """Returns the linear maps to queries, keys and values; those of one name are one after the other in its tensors.

    Args:
        names: names of the three.
        rows: number of rows of each in the stored tensor.
        biased: letters of those with a bias.
        joint: text between a name and "weight" or "bias".
    """
    parts, sizes = list(zip("qkv", names, rows, strict=True)), {"h": head_dim}
    kernels = [(f"{name}{joint}weight", f"{path}/{part}/kernel", n) for part, name, n in parts]
    biases = [(f"{name}{joint}bias", f"{path}/{part}/bias", n) for part, name, n in parts if part in biased]
    return beside(kernels, INTO_HEADS, sizes) + beside(biases, HEAD_BIAS, sizes)


def head_by_head(name: str, path: str, sizes: Mapping[str, int]) -> list[Weight]:
    """Returns queries, keys and values in one tensor: head after head, each with its rows of the three.

    Args:
        sizes: number of heads, "n", or size of a head, "h".
    """
    lines, sizes = [], {**sizes, "p": 3}
    for part, letter in enumerate("qkv"):
        lines.append(Weight(f"{name}.weight", f"{path}/{letter}/kernel", "(n p h) e -> p e n h", sizes, part=part))
        lines.append(Weight(f"{name}.bias", f"{path}/{letter}/bias", "(n p h) -> p n h", sizes, part=part))
    return lines


def nested(table: Table, name: str, path: str) -> tuple[Weight, ...]:
    """Returns a part's weights as those of a larger model: names begin with `name`, paths with `path`."""
    return tuple(replace(w, name=name + w.name, path=path + w.path) for w in table.weights)


@dataclass(frozen=True, kw_only=True)
class Family:
    """The description of a module with which its Hugging Face folders are read and written.

    Attributes:
        name: its usual name, "LLaMA, Vicuna".
        architectures: values of `architectures` in config.json that it reads.
        from_hf: the dictionary of config.json -> the module's config; refuses unsupported options by name.
        to_hf: the module's config -> the dictionary of config.json, with `architectures` and `model_type`.
        table: the module's config -> Table.
        sample: the module's config -> the arguments with which `init` creates every parameter; by default a batch of
            the whole model, see `mllm_jax.checkpoints.table` for those of language models and of encoders.
        oracle: reference class of the parity test; by default its first architecture.
        layout: for a model that reads media: (the module's config, the folder) -> the preparation of its images and
            their positions in the text, see `mllm_jax.models.processor.Layout`.
        settle: (the module's config, the names of the stored tensors) -> the config, if config.json alone is ambiguous.
    """

    name: str
    architectures: tuple[str, ...]
    from_hf: Callable[[dict], Any]
    to_hf: Callable[[Any], dict]
    table: Callable[[Any], Table]
    sample: Callable[[Any], tuple] = batch_sample
    oracle: str = ""
    layout: Callable[[Any, Path], Any] | None = None
    settle: Callable[[Any, Collection[str]], Any] = lambda config, stored: config


def families(names: Mapping[str, str], **filled: Any) -> tuple[Family, ...]:
    """Returns a family for each architecture, by its usual name; `filled` are fields with one value for all."""
    return tuple(Family(name=name, architectures=(hub,), **filled) for hub, name in names.items())
