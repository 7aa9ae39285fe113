"""Gives the initial parameters of an older run their present names, so that its losses can be compared.

python tests/training/rename_parts.py OLD_RUN NEW_RUN

NEW_RUN was begun by the same config with the present code. Its `initial` is replaced by that of OLD_RUN, leaf for leaf.
"""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import jax

from mllm_jax.checkpoints.training import load_snapshot, save_snapshot, snapshot_meta
from mllm_jax.models.part_names import NEW_NAMES


def renamed(path: str) -> str:
    """Returns the present path of a parameter of an older run."""
    part, slash, rest = path.partition("/")
    return NEW_NAMES.get(part, part) + slash + rest


def take_over(old: Path, new: Path) -> None:
    """Replaces the initial parameters of `new` by those of `old`, without those that no longer exist."""
    meta, today = snapshot_meta(old / "initial"), snapshot_meta(new / "initial")
    wanted = {path for path in meta["stored"] if renamed(path) in today["fingerprint"]}
    missing = today["fingerprint"].keys() - {renamed(path) for path in wanted}
    if missing:
        raise SystemExit(f"{old} has none of {sorted(missing)}")
    shapes = json.loads((old / "initial" / "record.json").read_text())["leaves"]
    abstract = {path: jax.ShapeDtypeStruct(*shapes[path]) for path in wanted}
    leaves = load_snapshot(old / "initial", abstract, whole=False)[0]
    facts = today | {
        "fingerprint": {renamed(path): meta["fingerprint"][path] for path in wanted},
        "stored": sorted(map(renamed, wanted)),
    }
    shutil.rmtree(new / "initial")
    save_snapshot(new / "initial", {renamed(path): leaf for path, leaf in leaves.items()}, facts)


if __name__ == "__main__":
    take_over(*map(Path, sys.argv[1:]))
