"""Conversion of a model folder to another kind or dtype, which is read back and compared bit by bit."""

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
from mllm_jax.models.pipelines import is_pipeline
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
    """The checksums of source and target, each read from its files, with the hub's names.

    Attributes:
        expected: of the source's tensors, cast if another dtype was requested; equal to `target`.
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
        to: the kind of the target; None: the kind that the source does not have.
        dtype: of the target's tensors; None: the source's.
        overwrite: whether to replace an existing model.
        say: is called with each line of the report.

    Raises:
        CheckpointError: the source cannot be read, the target cannot be written, or it reads back differently.
        ConfigError: the model is not supported.
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
    del params  # the proof reads the files

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
    """Returns {the hub's name: a function that returns this tensor} of a model folder of either kind.

    Tensors come from the files if these have the names that we write; otherwise from the parameters.
    """
    if not is_native(folder) and not is_pipeline(folder):
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
