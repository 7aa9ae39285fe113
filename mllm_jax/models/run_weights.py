"""Reading of a run's weights: the initial ones and those of its stages; see `mllm_jax.training.weights`."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

import jax
from flax.traverse_util import flatten_dict, unflatten_dict
from jax.sharding import Mesh

from mllm_jax.checkpoints.run import RunFolder, words_of
from mllm_jax.checkpoints.training import check_fingerprint, compare_fingerprints, load_snapshot, snapshot_meta
from mllm_jax.errors import CheckpointError, RunFolderError, TrainingError
from mllm_jax.models.params import placed_together, shardings_of
from mllm_jax.models.part_names import is_inside
from mllm_jax.models.part_sources import held_by, read_source
from mllm_jax.models.processor import Processor
from mllm_jax.sharding.hosts import from_first
from mllm_jax.sharding.mesh import make_fitting_mesh

Leaves = dict[str, Any]  # path -> leaf


def load_run(folder: RunFolder, devices: Sequence[jax.Device] | None = None, *, mesh: Mesh | None = None):
    """Reads a run's model with the parameters of its finished stages.

    Only the last weights are read. The run's mesh is used if it fits the devices; otherwise the weights are sharded
    over the available ones (`fsdp`), so that a run of a pod opens on a laptop.

    Returns:
        (experiment, model, params, processor, mesh)

    Raises:
        RunFolderError: the folder has no run, or the tokenizer is not the run's.
        TrainingError: no stage is finished.
        CheckpointError: weights are absent, damaged or not those that the run was trained with.
    """
    experiment = folder.experiment()
    if not (ended := from_first(folder.ended(experiment))):
        raise TrainingError(f"{folder.path}: no stage is finished", "a run that has ended a stage", "train it further")
    mesh = make_fitting_mesh(experiment.mesh, devices) if mesh is None else mesh
    config = experiment.model_of()
    params, _ = params_of(experiment, folder, (config,), mesh, ended)
    return experiment, config.make(), params, Processor.of_run(folder, experiment), mesh


def finished_stages(folder: RunFolder, experiment: Any) -> int:
    """Counts the stages, from the first on, that are completely trained."""
    return len(experiment.stages) - len(from_first(folder.unfinished(experiment)))


def params_of(experiment: Any, folder: RunFolder, configs: Sequence[Any], mesh: Mesh, stages: int) -> tuple[dict, dict]:
    """Reads each parameter from its last snapshot: of these stages, `initial`, or its `Pretrained` source.

    Args:
        configs: of the compositions whose parameters are read.
        stages: the number of stages, from the first on.

    Raises:
        CheckpointError: see `load_run`.
    """
    placed = placed_together(configs, mesh, experiment.part_rules)
    wanted: Leaves = flatten_dict(placed, sep="/")
    begin = initial_meta(folder)
    _check_words(folder, begin)
    known: dict[str, int] = begin["fingerprint"]
    places: dict[str, Path | None] = dict.fromkeys(begin["stored"], folder.initial)
    for index, stage in enumerate(experiment.stages[:stages]):
        snapshot = folder.snapshot(index, stage.name)
        meta = snapshot_meta(snapshot)
        _check_began(meta, known, stage)
        known = known | meta["fingerprint"]
        places |= dict.fromkeys(meta["fingerprint"], snapshot)
    found: Leaves = {}
    for place in dict.fromkeys(places.values()):
        there = {path: leaf for path, leaf in wanted.items() if places.get(path) == place}
        found |= load_snapshot(place, there, whole=False)[0] if there else {}
    found |= read_sources(experiment, placed, wanted.keys() - found.keys(), mesh, known)
    if absent := sorted(wanted.keys() - found.keys()):
        raise CheckpointError(
            f"{folder.path}: no stage and no source has {len(absent)} of the model's leaves, such as {absent[:3]}",
            "the weights of the whole model",
            "restore the run folder, or start over with --fresh",
        )
    return unflatten_dict({path: found[path] for path in wanted}, sep="/"), shardings_of(placed)


def _check_words(folder: RunFolder, begin: dict) -> None:
    """Refuses a tokenizer, or processor files, that differ from those at the start of the run.

    Raises:
        RunFolderError: names the files that differ.
    """
    expected = begin["words"]
    actual = from_first(words_of(folder))
    if wrong := sorted(name for name in actual.keys() | expected.keys() if actual.get(name) != expected.get(name)):
        raise RunFolderError(
            f"{folder.path}: {', '.join(wrong)}, which the run was not trained with",
            "the tokenizer's files as training wrote them",
            "restore them: with other ids or another template the weights mean something else",
        )


def initial_meta(folder: RunFolder) -> dict[str, Any]:
    if not from_first(folder.initial.is_dir()):
        raise CheckpointError(
            f"{folder.path} without {folder.initial.name}/", "the weights that the run began with", "restore the folder"
        )
    return snapshot_meta(folder.initial)


def read_sources(experiment: Any, placed: dict, missing: Collection[str], mesh: Mesh, known: dict[str, int]) -> Leaves:
    """Reads leaves that no folder of the run holds from their `Pretrained` sources."""
    found: Leaves = {}
    for source in experiment.pretrained:
        held = held_by(source, experiment)
        if wanted := [path for path in missing if is_inside(path, held)]:
            read = flatten_dict(read_source(source, experiment, mesh, placed, reshape=False), sep="/")
            leaves = {path: read[path] for path in wanted}
            check_fingerprint(
                leaves,
                {path: known[path] for path in wanted if path in known},
                source.folder,
                wanted="the weights that the run began with",
                todo="put them back there; `mllm train --self-contained` copies them while they are the same",
            )
            found |= leaves
    return found


def _check_began(meta: dict, known: dict[str, int], stage: Any) -> None:
    """Refuses a finished stage whose initial weights differ from those of the stages before it, by fingerprints."""
    expected = meta["frozen"]["fingerprint"] | meta["began"]  # of the composition that the stage trained
    actual = {path: value for path, value in known.items() if path in expected}
    compare_fingerprints(actual, expected, f"the weights before stage {stage.name}")
