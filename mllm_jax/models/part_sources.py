"""Where parts of a model begin: other models' folders, and stages of other runs; a source is a `Pretrained`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh

from mllm_jax.checkpoints.run import RunFolder
from mllm_jax.checkpoints.training import load_snapshot
from mllm_jax.errors import CheckpointError, ConfigError
from mllm_jax.models.params import shardings_of
from mllm_jax.models.part_names import part_differences
from mllm_jax.models.protocol import TakesFromExperiment
from mllm_jax.models.registry import abstract_init, from_pretrained, pretrained_config


def held_by(source: Any, experiment: Any) -> set[str]:
    """The names of the parts, and of parameters beside them, that begin with what the source holds."""
    if source.part != "*":
        return {source.part}
    config = experiment.model_of()
    return set(abstract_init(config.make(), config.batch_spec().empty(), method="touch"))


def read_source(source: Any, experiment: Any, mesh: Mesh, wanted: dict) -> dict:
    """Reads what a source holds for an experiment: {part: parameters}, or all parts of its model of "*".

    Args:
        wanted: nested ShapeDtypeStructs with shardings, of whole parts of the model.

    Raises:
        ConfigError: a source whose model is not the part's.
        CheckpointError: weights that are absent, damaged or of other shapes.
    """
    if source.part == "*":
        held = {name: wanted[name] for name in held_by(source, experiment)}
        return _from_model(source, experiment.model_of(), mesh, held)
    config, part = experiment.parts[source.part], wanted[source.part]
    read = _from_model(source, config, mesh, part) if source.stage is None else _from_run(source, config, part)
    return {source.part: read}


def snapshot_of(source: Any) -> Path:
    """Where the run keeps what the stage trained. Raises RunFolderError (no run) or ConfigError (no such stage)."""
    run = RunFolder(Path(source.folder))
    names = [stage.name for stage in run.experiment().stages]
    if source.stage not in names:
        raise ConfigError(
            f"stage {source.stage!r} of {source.folder}", f"one of {names}", f"change the source of {source.part}"
        )
    return run.snapshot(names.index(source.stage), source.stage)


def _from_model(source: Any, config: Any, mesh: Mesh, wanted: dict) -> dict:
    _require_same(source, config, pretrained_config(source.folder))
    # float32 as all that is trained; a stage may hold what it freezes in less.
    _, params = from_pretrained(source.folder, dtype="float32", mesh=mesh)
    return jax.device_put(params, shardings_of(wanted))


def _from_run(source: Any, config: Any, wanted: dict) -> dict:
    _require_same(source, config, RunFolder(Path(source.folder)).experiment().parts.get(source.part))
    snapshot = snapshot_of(source)
    if not snapshot.is_dir():
        raise CheckpointError(
            f"{source.folder}: stage {source.stage} has not ended", "its parameters", "train that run further first"
        )
    return load_snapshot(snapshot, {source.part: wanted}, whole=False)[0][source.part]


def _require_same(source: Any, ours: Any, theirs: Any) -> None:
    if isinstance(theirs, TakesFromExperiment):  # a folder's own model, of which nothing is open either
        theirs = theirs.beside(theirs, 0)
    if changed := part_differences(theirs, ours):
        shown = "".join(f"\n  {line}" for line in changed[:10])
        name = "model" if source.part == "*" else f"model.{source.part}"
        raise ConfigError(
            f"{source.folder} as {name}, which is another model:{shown}",
            "the config that the weights were trained with",
            f"build {name} from it: mllm_jax.pretrained_config(folder), or the run's own config",
        )
