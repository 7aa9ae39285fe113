"""The weights of a run: the initial ones, kept once in its folder, and those that its stages trained.

    initial/          parameters drawn at the start and, with `self_contained`, those of `Pretrained` parts
    stages/0-align/   parameters that a stage trained

Each folder's meta has a fingerprint of every leaf that it represents, so that opening a run finds files that were
swapped or changed. No parameter is drawn twice: another compiler or processor draws other last bits.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from flax.traverse_util import flatten_dict
from jax.sharding import Mesh

from mllm_jax.checkpoints.run import RunFolder, words_of
from mllm_jax.checkpoints.training import (
    fingerprint,
    load_snapshot,
    save_snapshot,
)
from mllm_jax.errors import RunFolderError
from mllm_jax.models.params import placed_together
from mllm_jax.models.part_names import is_inside
from mllm_jax.models.part_sources import held_by, reshaped_paths
from mllm_jax.models.run_weights import finished_stages, initial_meta, params_of, read_sources
from mllm_jax.sharding.hosts import from_first
from mllm_jax.training.config import Experiment
from mllm_jax.training.pretrained import initial_params

Leaves = dict[str, Any]  # path -> leaf


def starting_params(
    experiment: Experiment, folder: RunFolder, mesh: Mesh, *, self_contained: bool = False
) -> tuple[dict, dict]:
    """Returns the parameters with which training continues; a new run draws or reads them, and saves them.

    Args:
        self_contained: copy the weights of `Pretrained` parts into the run folder, now or at its first start.

    Returns:
        (params, shardings): nested dicts of float32 arrays and of their NamedShardings.

    Raises:
        CheckpointError: as `load_run`; RunFolderError: a folder with stages or checkpoints but without `initial`.
    """
    if from_first(folder.initial.is_dir()):
        if self_contained:
            _copy_sources(experiment, folder, mesh)
        return params_of(experiment, folder, experiment.compositions, mesh, finished_stages(folder, experiment))
    if from_first(folder.begun()):
        raise RunFolderError(
            f"{folder.path}: stages or checkpoints without {folder.initial.name}/, the weights that the run began with",
            "both of them",
            "restore the folder, or start over with --fresh",
        )
    params, shardings = initial_params(experiment, mesh)
    leaves = flatten_dict(params, sep="/")
    held = {name for source in experiment.pretrained for name in held_by(source, experiment)}
    # Parameters resized for another image size or vocabulary are kept: made elsewhere, their last bits would differ.
    made = {path for source in experiment.pretrained for path in reshaped_paths(source, experiment)}
    read = [path for path in leaves if is_inside(path, held) and path not in made]
    stored = list(leaves) if self_contained else [path for path in leaves if path not in set(read)]
    _keep(folder, leaves, stored, from_first(words_of(folder)))
    return params, shardings


# ---- inside


def _keep(folder: RunFolder, leaves: Leaves, stored: Sequence[str], words: dict[str, str]) -> None:
    """Writes `initial`: some of the leaves that the run began with, and the fingerprints of all."""
    meta = {"fingerprint": fingerprint(leaves), "stored": sorted(stored), "words": words}
    save_snapshot(folder.initial, {path: leaves[path] for path in stored}, meta)


def _copy_sources(experiment: Experiment, folder: RunFolder, mesh: Mesh) -> None:
    """Copies the weights that `initial` only refers to into it."""
    begin = initial_meta(folder)
    if len(begin["stored"]) == len(begin["fingerprint"]):
        return
    placed = placed_together(experiment.compositions, mesh, experiment.part_rules)
    leaves = flatten_dict(placed, sep="/")
    leaves |= load_snapshot(folder.initial, {path: leaves[path] for path in begin["stored"]})[0]
    leaves |= read_sources(experiment, placed, leaves.keys() - set(begin["stored"]), mesh, begin["fingerprint"])
    _keep(folder, leaves, list(leaves), begin["words"])
