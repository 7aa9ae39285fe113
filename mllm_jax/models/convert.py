"""Conversion with proof: a model folder into another kind or dtype, read back from the disk and compared bit by bit."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from flax import linen as nn

from mllm_jax.checkpoints.hf import Checksum, checksum, float_dtype, hub_tensors, open_weights
from mllm_jax.checkpoints.leaves import flatten
from mllm_jax.checkpoints.native import is_native, write_native
from mllm_jax.errors import CheckpointError, ConfigError
from mllm_jax.models.registry import (
    abstract_params,
    family_of_config,
    from_pretrained,
    read_pretrained,
    save_pretrained,
)

Kind = Literal["huggingface", "native"]


@dataclass(frozen=True)
class Proof:
    """What the source and the target hold, each read from its files, in the hub's spelling.

    Attributes:
        expected: the source's tensors, cast where another dtype was asked for; equal to `target`.
    """

    source: Checksum
    expected: Checksum
    target: Checksum


def convert(
    source: str | Path,
    target: str | Path,
    *,
    to: Kind | None = None,
    dtype: Any = None,
    overwrite: bool = False,
    say: Callable[[str], None] = lambda line: None,
) -> Proof:
    """Writes the model in `source` as `target`, reads it back and compares every bit.

    Args:
        to: None is the kind that the source is not.
        dtype: of the target's tensors; None keeps the source's.
        overwrite: replace a model that is there.
        say: is told, line by line, what was done.

    Raises:
        CheckpointError: a source that cannot be read, a target that cannot be written or that reads back otherwise.
        ConfigError: an unsupported model.
    """
    source, target = Path(source), Path(target)
    if source.resolve() == target.resolve():
        raise ConfigError(f"{source} as source and as target", "two folders", "name another target")
    to = to or ("huggingface" if is_native(source) else "native")
    dtype = None if dtype is None else float_dtype(dtype)

    module, params = from_pretrained(source, dtype=dtype, report=lambda report: say(f"read         {report}"))
    say(f"model        {family_of_config(module.config).name} as {module.config.family}, to {to}")
    if to == "native":
        write_native(target, module.config, params, companions=source, overwrite=overwrite)
    else:
        save_pretrained(module, params, target, companions=source, overwrite=overwrite)
    del params  # the proof reads what lies on the disk

    tensors = _stored(source)
    before = checksum(tensors)
    expected = before if dtype is None else checksum(tensors, dtype)
    del tensors
    after = checksum(_read_back(target))
    say(f"source       {_line(before)}")
    if dtype is not None:
        say(f"  as {dtype.name:<10}{_line(expected)}")
    say(f"destination  {_line(after)}")
    if after != expected:
        raise CheckpointError(
            f"{target} reads back with {_line(after)}",
            _line(expected),
            "do not use it; check the disk and report the model's config.json",
        )
    say("round trip identical" if dtype is None else f"identical to the source cast to {dtype.name}")
    return Proof(before, expected, after)


def _stored(folder: Path) -> dict[str, Callable[[], np.ndarray]]:
    """The hub's name -> a function that gives this tensor of a model folder of either kind.

    As the files have it where they are spelled as we would write them; else put together from the parameters.
    """
    if not is_native(folder):
        config, family = read_pretrained(folder)
        if family == family_of_config(config):
            leaves = flatten(nn.meta.unbox(abstract_params(config, family)))[0]
            entries = open_weights(folder, family.table(config), {path: leaf.shape for path, leaf in leaves.items()})
            return {name: entry.map for name, entry in entries.items()}
    return _read_back(folder)


def _read_back(folder: Path) -> dict[str, Callable[[], np.ndarray]]:
    module, params = from_pretrained(folder, report=lambda report: None)
    return hub_tensors(family_of_config(module.config).table(module.config), params)


def _line(found: Checksum) -> str:
    return f"{found.tensors} tensors, {found.bytes:,} bytes, sha256 {found.sha256}"
