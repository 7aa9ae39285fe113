"""Training: the stages of an experiment one after the other, resumable at any step."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from pathlib import Path

import jax
from jax.sharding import Mesh

from mllm_jax.checkpoints.description import describe
from mllm_jax.checkpoints.own_modules import remember
from mllm_jax.checkpoints.run import RunFolder
from mllm_jax.checkpoints.training import snapshot_meta
from mllm_jax.models.part_sources import snapshot_of
from mllm_jax.models.run_weights import finished_stages
from mllm_jax.sharding.hosts import first_alone, from_first, is_first
from mllm_jax.sharding.mesh import make_mesh
from mllm_jax.training.config import Experiment, Pretrained
from mllm_jax.training.operations.metrics_writer import Sink
from mllm_jax.training.operations.monitors import attended
from mllm_jax.training.operations.progress import Progress
from mllm_jax.training.operations.run_folder import holding, open_run, write_json
from mllm_jax.training.operations.stopping import Interrupted
from mllm_jax.training.own_tokenizer import with_own_tokenizer
from mllm_jax.training.partition import join, num_parameters
from mllm_jax.training.pretrained import describe_sources
from mllm_jax.training.run_processor import prepare_processor
from mllm_jax.training.stage_run import StageRunner
from mllm_jax.training.weights import starting_params


def train(
    experiment: Experiment,
    run_dir: Path,
    *,
    fresh: bool = False,
    devices: Sequence[jax.Device] | None = None,
    cache_dir: Path | None = None,
    until: str | None = None,
    hang_seconds: float = 0.0,
    profile: bool = False,
    self_contained: bool = False,
    sinks: Sequence[Sink] = (),
) -> RunFolder:
    """Trains every stage that the run folder does not hold yet, and returns the folder.

    Args:
        fresh: start over, removing what an earlier run left there.
        devices: to train on; None: all.
        cache_dir: folder for measured lengths; None: the run folder.
        until: the stage to end with; None: the last.
        hang_seconds: after this time without progress, prints all stacks and exits (`mllm train`: 1800 s).
        profile: write a trace of a few steps.
        self_contained: copy the weights of `Pretrained` parts into the run folder, instead of referring to them.
        sinks: receive the metrics too, such as `training.operations.wandb.Wandb`.

    A run in the folder continues with the given config: `open_run` describes the changes that are allowed.

    Every process calls this with the same arguments; `run_dir` is one folder that all of them see. One run at a time
    trains in it.

    Raises:
        RunFolderError: another run's folder, or one that another process is writing.
        Interrupted: SIGTERM or SIGINT came; everything up to the last finished step is saved.
        TrainingError: a loss that is not finite, with `nonfinite="stop"`.
    """
    how = dict(hang_seconds=hang_seconds, profile=profile, self_contained=self_contained)
    for source in experiment.pretrained:  # the runs that this one builds on
        if source.made_by is not None and not _is_made(source):
            options = dict(devices=devices, cache_dir=cache_dir, hang_seconds=hang_seconds)
            train(source.made_by, Path(source.folder), until=source.stage, **options)
    experiment = with_own_tokenizer(experiment)
    remember(describe(experiment))
    mesh = make_mesh(experiment.mesh, devices)
    notes: list[str] = []
    with holding(run_dir):
        folder = open_run(run_dir, experiment, fresh=fresh, say=notes.append)
        with _receiving(sinks, experiment, folder):
            _train_stages(experiment, folder, mesh, cache_dir, until, sinks, notes, **how)
    return folder


@contextlib.contextmanager
def _receiving(sinks: Sequence[Sink], experiment: Experiment, folder: RunFolder) -> Iterator[None]:
    """Begins and closes the sinks, on the first process only."""
    finished = False
    try:
        first_alone(lambda: [sink.begin(experiment, folder.path) for sink in sinks])
        yield
        finished = True
    finally:
        for sink in sinks if is_first() else ():
            sink.close(finished)


def _train_stages(
    experiment: Experiment,
    folder: RunFolder,
    mesh: Mesh,
    cache_dir: Path | None,
    until: str | None,
    sinks: Sequence[Sink],
    notes: Sequence[str],
    *,
    hang_seconds: float,
    profile: bool,
    self_contained: bool,
) -> None:
    # ---- the processor; all parameters, drawn or read on their devices
    processor = prepare_processor(experiment, folder)
    params, _ = starting_params(experiment, folder, mesh, self_contained=self_contained)
    finished = finished_stages(folder, experiment)
    kind = mesh.devices.flat[0].device_kind
    facts = {
        "config": experiment.name,
        "devices": f"{mesh.devices.size} x {kind}",
        "parameters": {part: num_parameters(tree) for part, tree in sorted(params.items())},
        "pretrained": describe_sources(experiment),
        "stages": [],
    }

    # ---- the stages
    done_before = 0
    with Progress(quiet=not is_first()) as progress, attended(folder, progress, hang_seconds, profile) as by:
        for note in notes:
            progress.message(note)
        for index, stage in enumerate(experiment.stages):
            if index < finished:
                stage_facts = snapshot_meta(folder.snapshot(index, stage.name))["facts"]
            else:
                where = (experiment, index, folder, processor, mesh, progress, by)
                last = index + 1 == len(experiment.stages) or stage.name == until
                trained, stage_facts = StageRunner(*where, done_before, cache_dir, sinks, last).run(params)
                params = join(params, trained)
                by.goodput.write(finished=last)
            facts["stages"].append(stage_facts)
            done_before += stage_facts["steps"]
            if is_first():
                write_json(folder.path / "run.json", facts)
            if by.stopping.asked:
                raise Interrupted(f"stopped after stage {stage.name}; the same command continues from there")
            if stage.name == until:
                break


def _is_made(source: Pretrained) -> bool:
    made = RunFolder(Path(source.folder)).config_file.is_file() and snapshot_of(source).is_dir()
    return from_first(made)
