"""What a model family tells the checkpoint engine: which stored tensor is which parameter, read both ways."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from mllm_jax.checkpoints.sample import batch_sample


@dataclass(frozen=True)
class Weight:
    """One parameter and the stored tensor, or part of one, that it is.

    Attributes:
        name: the hub's name. "{layer}" in it counts 0, 1, ...: these tensors are stacked along a new first axis.
            Where layers repeat in groups of two, "{layer*2+0}" counts 0, 2, ... and "{layer*2+1}" counts 1, 3, ...
        path: the parameter's place in the tree, such as "layers/attention/q/kernel".
        pattern: an einops pattern from the stored axes to ours, without the layers' axis: "(n h) e -> e n h"; the same
            pattern turned round writes. Empty: as it is.
        sizes: the axes that einops cannot infer.
        rows: (start, stop) of the stored tensor's first axis, where several parameters lie one after the other in one
            tensor; the lines that share a name must cover it.
        part: the index on the first axis that `pattern` gives, where several parameters are interleaved in one tensor:
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
        spellings: (regular expression, replacement) pairs that turn other spellings of names into the hub's, tried in
            order on every stored name.
        ignored: names, with "{layer}" or not, that may be stored and hold nothing to learn, such as RoPE's frequencies
            or a head that is tied to the embedding.
    """

    weights: tuple[Weight, ...]
    spellings: tuple[tuple[str, str], ...] = ()
    ignored: tuple[str, ...] = ()


def nested(table: Table, name: str, path: str) -> tuple[Weight, ...]:
    """A part's weights as those of a larger model: names begin with `name`, paths with `path`."""
    return tuple(replace(w, name=name + w.name, path=path + w.path) for w in table.weights)


@dataclass(frozen=True, kw_only=True)
class Family:
    """What stands beside a module so that its Hugging Face folders can be read and written.

    Attributes:
        name: as people say it, "LLaMA, Vicuna".
        architectures: the `architectures` of config.json that it reads.
        from_hf: config.json's dictionary -> the module's config; refuses by name what it cannot honour.
        to_hf: the module's config -> config.json's dictionary, `architectures` and `model_type` included.
        table: the module's config -> Table.
        sample: the module's config -> the arguments with which `init` creates every parameter; by default a batch of
            the whole model, see `mllm_jax.checkpoints.sample` for those of language models and of encoders.
        oracle: the reference class that parity is proven against.
        layout: of a model that reads media: (the module's config, the folder) -> how its pictures are prepared and
            where they stand in the text, see `mllm_jax.models.processor.Layout`.
        settle: (the module's config, the names of the stored tensors) -> the config, where config.json alone leaves
            something open.
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
