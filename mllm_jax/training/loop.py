"""Training: the stages of an experiment one after the other, resumable at any step."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import jax
import numpy as np
from jax.sharding import Mesh

from mllm_jax.checkpoints.description import describe
from mllm_jax.checkpoints.training import (
    TrainingCheckpoints,
    compare_fingerprints,
    fingerprint,
    save_snapshot,
    snapshot_meta,
)
from mllm_jax.data.pipeline import Pipeline, training_texts
from mllm_jax.data.tokenizer import Tokenizer
from mllm_jax.errors import TrainingError
from mllm_jax.models.dialogue import DialogueEncoder
from mllm_jax.models.registry import has_layout
from mllm_jax.sharding.hosts import first_alone, from_first, is_first
from mllm_jax.sharding.mesh import make_mesh
from mllm_jax.training.config import Experiment, Pretrained, Stage, require_vocabulary
from mllm_jax.training.features import FeatureCache
from mllm_jax.training.named import dialogues_of
from mllm_jax.training.operations.meter import Meter, peak_flops
from mllm_jax.training.operations.metrics_writer import MetricsWriter
from mllm_jax.training.operations.monitors import Monitors, attended
from mllm_jax.training.operations.progress import Progress
from mllm_jax.training.operations.run_folder import RunFolder, holding, open_run, write_json
from mllm_jax.training.partition import join, num_parameters, split
from mllm_jax.training.pretrained import describe_sources, require_words, snapshot_of
from mllm_jax.training.stage import build_stage, hold_frozen
from mllm_jax.training.step import local_rows, place_batch
from mllm_jax.training.weights import finished_stages, starting_params


class Interrupted(Exception):
    """A signal asked the run to stop; a checkpoint was saved."""


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
                runner = StageRunner(experiment, index, folder, tokenizer, dialogues, mesh, model, shardings, progress)
                trained, stage_facts = runner.run(params, done_before, cache_dir, by)
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


class StageRunner:
    """One stage of one run: builds the step, restores, loops, saves."""

    def __init__(self, experiment, index, folder, tokenizer, dialogues, mesh, model, shardings, progress):
        self.experiment, self.index, self.folder = experiment, index, folder
        self.stage: Stage = experiment.stages[index]
        self.tokenizer, self.dialogues, self.mesh, self.model = tokenizer, dialogues, mesh, model
        self.shardings, self.progress = shardings, progress

    def pipeline(self, mixture, cache_dir, salt: int = 0) -> Pipeline:
        common = dict(seed=(self.experiment.seed * 1009 + self.index) * 2 + salt, cache_dir=cache_dir)
        if self.dialogues is not None:
            make = partial(Pipeline, mixture, None, dialogues=self.dialogues)
        else:
            make = partial(Pipeline, mixture, self.tokenizer, media_tokens=self.experiment.model.media_tokens)
        if jax.process_count() > 1:  # the first reads all records to measure them, the others only their rows
            common["cache_dir"] = self.folder.lengths
            first_alone(partial(make, **common))
        return make(**common)

    def frozen_meta(self, frozen) -> dict:
        """Where the frozen parameters come from and what they are: enough to find and to check them."""
        sources = {"": f"init(seed={self.experiment.seed})"} | describe_sources(self.experiment)
        for i, earlier in enumerate(self.experiment.stages[: self.index]):
            sources |= {pattern: f"stages/{i}-{earlier.name}" for pattern in earlier.trainable}
        return {"sources": sources, "fingerprint": fingerprint(frozen)}

    def run(self, params, done_before: int, cache_dir: Path | None, by: Monitors):
        """Trains the stage from its newest checkpoint or from its start.

        Returns:
            (the trained parameters, facts for the report).
        """
        stage, experiment, say = self.stage, self.experiment, self.progress.message
        account, started = by.goodput, time.monotonic()

        # ---- data
        data = self.pipeline(stage.data, cache_dir)
        validation = self.pipeline(stage.validation, cache_dir, salt=1) if stage.validation else None
        packing = data.plan.statistics(64)
        dropped = sum(m.dropped_turns for m in data.measured)
        bad = sum(len(m.bad) for m in data.measured)

        # ---- what is trained and what is frozen
        trainable, frozen = split(params, stage.trainable)
        frozen_meta, began = self.frozen_meta(frozen), fingerprint(trainable)
        frozen = hold_frozen(stage, frozen)
        features = self.feature_cache(join(params, frozen), frozen_meta) if stage.cache_features else None
        rows, shapes = local_rows(self.mesh, stage.data.rows), data.shapes()
        if features is not None:
            shapes = features.shapes(shapes)
        placed = jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), params, self.shardings)
        batch_shapes = {name: jax.ShapeDtypeStruct(*shape) for name, shape in shapes.items()}
        program = build_stage(experiment, self.index, self.mesh, batch_shapes, placed)
        key = jax.random.fold_in(jax.random.key(experiment.seed), self.index)
        # The state is donated step by step; `params` stays the caller's, so the state starts from a copy.
        state = program.init(jax.tree.map(lambda x: x.copy(), trainable), key)
        sizes = program.sizes
        shown = ", ".join(f"{name.split('_')[0]} {size / 2**20:.2f} MiB" for name, size in sizes.items())
        say(
            f"stage {stage.name}: {shown}; rows of {stage.data.length} filled to {packing['fill']:.1%}, "
            f"{packing['examples_per_step']:.0f} examples a step, left over {packing['left_over']:.2%}, "
            f"turns dropped for length {dropped}, bad records {bad}"
        )

        # ---- the newest checkpoint of this stage, if there is one
        best = "validation_loss" if validation else None
        where = self.folder.checkpoints(self.index, stage.name)
        checkpoints = TrainingCheckpoints(where, keep_last=experiment.checkpoint.keep_last, keep_best=best)
        start = 0
        if from_first(checkpoints.latest()) is not None:
            start, restored, meta = checkpoints.restore({"state": program.state})
            saved = meta["frozen"]["fingerprint"]
            compare_fingerprints(frozen_meta["fingerprint"], saved, f"the frozen weights beside {where}")
            compare_fingerprints(began, meta["began"], f"the weights with which {where} began")
            state = restored["state"]
            say(f"stage {stage.name}: resumed at step {start}")
        for note in checkpoints.notes:
            say(note)
        account.resumed(done_before + start)
        writer = MetricsWriter(self.folder.path, resume_from=done_before + start) if is_first() else None

        # ---- the compiled steps
        step_fn, eval_fn = program.step, program.eval_step
        flops = program.flops()
        meter = Meter(flops)

        def save(step: int, metrics: dict[str, float] | None) -> None:
            meta = {
                "stage": stage.name,
                "step": step,
                "data_step": step,
                "key": np.asarray(jax.device_get(state.key)).ravel().tolist(),
                "config": describe(experiment),
                "frozen": frozen_meta,
                "began": began,
            }
            with account.spending("checkpoint"):
                checkpoints.save(step, {"state": state}, meta, metrics)
                if writer:
                    writer.flush()
            account.reached(done_before + step, saved=True)
            by.watchdog.beat(f"the checkpoint of step {step} of stage {stage.name}")

        def report(step: int, metrics: dict, tokens: int) -> None:
            values = {name: float(value) for name, value in jax.device_get(metrics).items()}
            meter.tick(tokens)
            account.reached(done_before + step + 1)
            by.watchdog.beat(f"step {step + 1} of stage {stage.name}")
            if values["nonfinite"]:
                given = f"stage {stage.name}, step {step}: loss {values['loss']}, gradient norm {values['grad_norm']}"
                if experiment.nonfinite == "stop":
                    raise TrainingError(
                        f"{given}; the batch: {data.describe(step)}",
                        "finite numbers; the update was not applied",
                        "look at these examples, lower the learning rate, or set nonfinite='skip'",
                    )
                say(f"{given}: skipped; the batch: {data.describe(step)}")
            if writer and (values["nonfinite"] or (step + 1) % experiment.log_every == 0 or step + 1 == stage.steps):
                writer.write(done_before + step + 1, stage.name, values, meter.timing() | account.timing())
            self.progress.update(
                step + 1, loss=values["loss"], tokens_per_second=meter.tokens_rate, flops_per_second=meter.flops_rate
            )

        def batches():
            for local in data.iterate(start, stage.steps, rows):
                tokens = int((local["segments"] > 0).sum()) * stage.data.rows // len(rows)
                local = features(local) if features is not None else local
                yield tokens, place_batch(local, self.mesh, shapes, rows)

        def computing() -> bool:
            return pending is not None and not pending[1]["loss"].is_ready()

        # ---- the loop: step k is dispatched before the metrics of k-1 are read
        self.progress.stage(stage.name, stage.steps, start)
        pending = None
        by.profile.next_stage()
        with by.watchdog, account.spending("productive"):
            given = account.waited(batches(), computing)
            for step, (tokens, batch) in zip(range(start, stage.steps), given, strict=True):
                by.profile.before(step)
                with account.spending("compile" if step == start else "productive"):
                    state, metrics = step_fn(state, frozen, batch)
                if pending:
                    report(*pending)
                pending = (step, metrics, tokens)
                ended = step + 1
                by.profile.after(step, metrics, last=ended == stage.steps)
                stop = by.stopping.after_step() and ended < stage.steps
                scores = None
                if validation and (ended % stage.validate_every == 0 or ended == stage.steps):
                    with account.spending("other"):
                        asked = (validation, writer, done_before + ended, features, by.watchdog)
                        scores = self.validate(eval_fn, state.params, frozen, *asked)
                if ended < stage.steps and (ended % experiment.checkpoint.every_steps == 0 or stop):
                    report(*pending)
                    pending = None
                    save(ended, scores)
                if stop:
                    with account.spending("checkpoint"):
                        checkpoints.close()
                    if writer:
                        writer.close()
                    account.write()
                    raise Interrupted(
                        f"stopped at step {ended} of stage {stage.name}; the same command goes on from there"
                    )
            if pending:
                report(*pending)

        # ---- the stage's end: its parameters stay for good
        with account.spending("checkpoint"):
            checkpoints.close()
        if features is not None:
            features.close()
        seconds = time.monotonic() - started
        facts = {
            "name": stage.name,
            "steps": stage.steps,
            "seconds": seconds,
            **sizes,
            "tokens_per_second": meter.tokens_rate,
            "packing": packing["fill"],
            "flops_per_step": flops,
        }
        with account.spending("checkpoint"):
            kept = {"facts": facts, "frozen": frozen_meta, "began": began, "fingerprint": fingerprint(state.params)}
            save_snapshot(self.folder.snapshot(self.index, stage.name), state.params, kept)
        account.reached(done_before + stage.steps, saved=True)
        if writer:
            writer.close()
        return state.params, facts

    def feature_cache(self, params, frozen_meta) -> FeatureCache:
        """The encoder's features on disk, beside the run and under the name of what they come from."""
        key = hashlib.sha256(repr([frozen_meta["fingerprint"], describe(self.experiment.model)]).encode())
        folder = self.folder.features / key.hexdigest()[:16]
        return FeatureCache.of(folder, self.model, params, self.mesh, self.experiment.part_rules)

    def validate(self, eval_fn, params, frozen, data: Pipeline, writer, step: int, features, watchdog) -> dict:
        """Mean validation metrics by weight; written under `validation_...`."""
        rows, shapes = local_rows(self.mesh, data.mixture.rows), data.shapes()
        shapes = features.shapes(shapes) if features is not None else shapes
        total: dict[str, float] = {}
        for i in range(self.stage.validation_batches):
            local = data.batch(i, rows)
            batch = place_batch(features(local) if features is not None else local, self.mesh, shapes, rows)
            values = jax.device_get(eval_fn(params, frozen, batch))
            watchdog.beat(f"validation batch {i + 1} after step {step}")
            for name, value in values.items():
                total[name] = total.get(name, 0.0) + float(value) * (
                    float(values["weight"]) if name != "weight" else 1.0
                )
        weight = total.pop("weight")
        means = {f"validation_{name}": value / weight for name, value in total.items()}
        if writer:
            writer.write(step, self.stage.name, means, {})
        return means
