"""Trees as flat tables, path -> leaf, which a checkpoint stores and compares."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mllm_jax.errors import CheckpointError

PyTree = Any
Leaves = dict[str, Any]
SHOWN = 10  # number of differing leaves in a message


def flatten(tree: PyTree) -> tuple[Leaves, Any]:
    """Returns path -> leaf in tree order, and the structure. Containers without leaves are only in the structure."""
    pairs, structure = jax.tree_util.tree_flatten_with_path(tree)
    leaves = {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in pairs}
    if len(leaves) != len(pairs):
        raise CheckpointError("a tree in which two leaves have the same path", "one path per leaf", "rename the keys")
    return leaves, structure


def dtype_of(leaf: Any) -> str:
    return str(leaf.dtype if hasattr(leaf, "dtype") else jnp.result_type(leaf))


def table_of(leaves: Leaves) -> dict[str, list]:
    return {path: [list(np.shape(leaf)), dtype_of(leaf)] for path, leaf in leaves.items()}


def storable(leaves: Leaves) -> Leaves:
    """Returns arrays that cannot change: host arrays are copied here, device arrays by the transfer to the host."""
    out, wrong = {}, []
    for path, leaf in leaves.items():
        if isinstance(leaf, jax.Array) and not jnp.issubdtype(leaf.dtype, jax.dtypes.extended):
            out[path] = leaf
        elif isinstance(leaf, (np.ndarray, np.generic, int, float)):
            out[path] = jnp.array(leaf)
        else:
            wrong.append(f"{path}: {getattr(leaf, 'dtype', type(leaf).__name__)}")
    if wrong:
        raise CheckpointError(
            f"{len(wrong)} leaves that cannot be stored{listed(wrong)}",
            "arrays of numbers",
            "store PRNG keys as jax.random.key_data, and everything else in meta",
        )
    return out


def require_same(path: Path, saved: dict[str, list], wanted: dict[str, list]) -> None:
    def show(entry: list | None) -> str:
        return "absent" if entry is None else f"{entry[1]}{entry[0]}"

    names = sorted(saved.keys() | wanted.keys())
    wrong = [
        f"{n}: {show(saved.get(n))} in the checkpoint, {show(wanted.get(n))} asked for"
        for n in names
        if saved.get(n) != wanted.get(n)
    ]
    if wrong:
        raise CheckpointError(
            f"{len(wrong)} of {len(names)} leaves of {path} do not match{listed(wrong)}",
            "the same leaves, shapes and dtypes as when it was saved",
            "resume with the configuration of the run that wrote it",
        )


def listed(lines: list[str]) -> str:
    more = f"\n    … and {len(lines) - SHOWN} more" if len(lines) > SHOWN else ""
    return "".join(f"\n    {line}" for line in lines[:SHOWN]) + more


def plain_json(meta: dict[str, Any]) -> dict[str, Any]:
    """Returns a copy of `meta`; refuses values that JSON would change."""

    def copy(value: Any, where: str) -> Any:
        if isinstance(value, dict) and all(isinstance(k, str) for k in value):
            return {k: copy(v, f"{where}[{k!r}]") for k, v in value.items()}
        if isinstance(value, list):
            return [copy(v, f"{where}[{i}]") for i, v in enumerate(value)]
        if value is None or isinstance(value, (str, int, float)):
            return value
        raise CheckpointError(
            f"{where} is {type(value).__name__}: {value!r:.80}",
            "JSON: dicts with string keys, lists, strings, numbers, booleans, None",
            "turn tuples into lists, paths into strings and arrays into numbers",
        )

    return copy(meta, "meta")
