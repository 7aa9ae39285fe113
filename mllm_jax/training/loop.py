"""Training: the stages of an experiment one after the other, resumable at any step."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path

import jax
from jax.sharding import Mesh

from mllm_jax.checkpoints.description import describe
from mllm_jax.checkpoints.training import snapshot_meta
from mllm_jax.data.pipeline import training_texts
from mllm_jax.data.tokenizer import Tokenizer
from mllm_jax.models.dialogue import DialogueEncoder
from mllm_jax.models.registry import has_layout
from mllm_jax.sharding.hosts import first_alone, from_first, is_first
from mllm_jax.sharding.mesh import make_mesh
from mllm_jax.training.config import Experiment, Pretrained, require_vocabulary
from mllm_jax.training.named import dialogues_of
from mllm_jax.training.operations.meter import peak_flops
from mllm_jax.training.operations.monitors import attended
from mllm_jax.training.operations.progress import Progress
from mllm_jax.training.operations.run_folder import RunFolder, holding, open_run, write_json
from mllm_jax.training.operations.stopping import Interrupted
from mllm_jax.training.partition import join, num_parameters
from mllm_jax.training.pretrained import describe_sources, require_words, snapshot_of
from mllm_jax.training.stage_run import StageRunner
from mllm_jax.training.weights import finished_stages, starting_params


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
) -> RunFolder:
    """Trains every stage that the run folder does not hold yet, and returns the folder.

    Args:
        fresh: start over, removing what an earlier run left there.
        devices: the devices to use; None: all.
        cache_dir: where measured lengths are kept.
        until: the stage to end with; None: the last.
        hang_seconds: this process ends, its stacks told, when nothing is finished for so long (`mllm train`: 1800).
        profile: write a trace of a few steps.
        self_contained: copy what `Pretrained` parts read into the run folder, instead of referring to their folders.

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
    mesh = make_mesh(experiment.mesh, devices)
    with holding(run_dir):
        folder = open_run(run_dir, experiment, fresh=fresh)
        _train_stages(experiment, folder, mesh, cache_dir, until, **how)
    return folder


def _train_stages(
    experiment: Experiment,
    folder: RunFolder,
    mesh: Mesh,
    cache_dir: Path | None,
    until: str | None,
    *,
    hang_seconds: float,
    profile: bool,
    self_contained: bool,
) -> None:
    # ---- the tokenizer, or a named model's processor; all parameters, made or read in place
    tokenizer = prepare_tokenizer(experiment, folder)
    dialogues = prepare_dialogues(experiment, folder)
    model = experiment.model.make()
    params, shardings = starting_params(experiment, folder, model, mesh, self_contained=self_contained)
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
    peak = peak_flops(kind, experiment.model.dtype)
    done_before = 0
    peak = peak * mesh.devices.size if peak else None
    with Progress(peak=peak, quiet=not is_first()) as progress, attended(folder, progress, hang_seconds, profile) as by:
        for index, stage in enumerate(experiment.stages):
            if index < finished:
                stage_facts = snapshot_meta(folder.snapshot(index, stage.name))["facts"]
            else:
                where = (experiment, index, folder, tokenizer, dialogues, mesh, model, shardings, progress, by)
                trained, stage_facts = StageRunner(*where, done_before, cache_dir).run(params)
                params = join(params, trained)
                by.goodput.write(finished=index + 1 == len(experiment.stages) or stage.name == until)
            facts["stages"].append(stage_facts)
            done_before += stage.steps
            if is_first():
                write_json(folder.path / "run.json", facts)
            if by.stopping.asked:
                raise Interrupted(f"stopped after stage {stage.name}; the same command goes on from there")
            if stage.name == until:
                break


def _is_made(source: Pretrained) -> bool:
    made = RunFolder(Path(source.folder)).config_file.is_file() and snapshot_of(source).is_dir()
    return from_first(made)


def prepare_tokenizer(experiment: Experiment, folder: RunFolder) -> Tokenizer | None:
    """The run's tokenizer: the one it holds, the one that the config names, or one trained on the stages' text.

    None for a named model, which has a processor instead.
    """
    if has_layout(experiment.model):
        return None
    first_alone(partial(_write_tokenizer, experiment, folder))
    tokenizer = folder.tokenizer()
    require_vocabulary(experiment.model, tokenizer.vocab_size)
    require_words(experiment, tokenizer)
    return tokenizer


def prepare_dialogues(experiment: Experiment, folder: RunFolder) -> DialogueEncoder | None:
    """A named model's processor, whose files the first process copies into the run; None for other models."""
    if jax.process_count() > 1:
        first_alone(partial(dialogues_of, experiment, folder))
    return dialogues_of(experiment, folder)


def _write_tokenizer(experiment: Experiment, folder: RunFolder) -> None:
    config = experiment.tokenizer
    if not folder.tokenizer_file.is_file():
        if config.folder is not None:
            tokenizer = Tokenizer.from_folder(Path(config.folder), config.system)
        elif config.path is not None:
            tokenizer = Tokenizer.load(Path(config.path))
        else:
            sources = {repr(describe(w.source)): w.source for stage in experiment.stages for w in stage.data.sources}
            built = [source.build() for _, source in sorted(sources.items())]
            tokenizer = Tokenizer.train(training_texts(built), config.vocab_size, config.phrases)
        if config.places:
            tokenizer = tokenizer.naming_places(config.places)
        tokenizer.save(folder.tokenizer_file)
