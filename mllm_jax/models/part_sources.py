"""Where parts of a model begin: other models' folders, and stages of other runs; a source is a `Pretrained`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh

from mllm_jax.checkpoints.description import describe
from mllm_jax.checkpoints.differences import differences
from mllm_jax.checkpoints.run import RunFolder
from mllm_jax.checkpoints.training import load_snapshot
from mllm_jax.errors import CheckpointError, ConfigError
from mllm_jax.models.params import shardings_of
from mllm_jax.models.registry import from_pretrained, pretrained_config

# How a part is started and computed; the parameters mean the same whatever these say.
_FREE = ("dtype", "remat", "scan_unroll", "mimetic_init")


def covers(source: Any, path: str) -> bool:
    """Returns whether a parameter, by its path, begins with what the source holds."""
    return source.part == "*" or path.partition("/")[0] == source.part


def read_source(source: Any, model: Any, mesh: Mesh, wanted: dict) -> dict:
    """Reads what a source holds of a model's config: {part: parameters}, or all parts of "*".

    Args:
        wanted: nested ShapeDtypeStructs with shardings, of whole parts of the model.

    Raises:
        ConfigError: a source whose model is not the part's.
        CheckpointError: weights that are absent, damaged or of other shapes.
    """
    if source.part == "*":
        return _from_model(source, model, mesh, wanted)
    config, part = getattr(model, source.part), wanted[source.part]
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
    _require_same(source, config, getattr(RunFolder(Path(source.folder)).experiment().model, source.part))
    snapshot = snapshot_of(source)
    if not snapshot.is_dir():
        raise CheckpointError(
            f"{source.folder}: stage {source.stage} has not ended", "its parameters", "train that run further first"
        )
    return load_snapshot(snapshot, {source.part: wanted}, whole=False)[0][source.part]


def _binding(described: Any) -> Any:
    """A described config without what is free, in its parts too."""
    if not isinstance(described, dict):
        return described
    return {name: _binding(value) for name, value in described.items() if name not in _FREE}


def _require_same(source: Any, ours: Any, theirs: Any) -> None:
    left, right = (_binding(describe(config)) if config is not None else {} for config in (theirs, ours))
    if changed := differences(left, right):
        shown = "".join(f"\n  {line}" for line in changed[:10])
        name = "model" if source.part == "*" else f"model.{source.part}"
        raise ConfigError(
            f"{source.folder} as {name}, which is another model:{shown}",
            "the config that the weights were trained with",
            f"build {name} from it: mllm_jax.pretrained_config(folder), or the run's own config",
        )
