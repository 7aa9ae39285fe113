"""One stage of one run: prepare, restore, loop, finish."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh

from mllm_jax.checkpoints.description import describe
from mllm_jax.checkpoints.run import RunFolder
from mllm_jax.checkpoints.training import TrainingCheckpoints, compare_fingerprints, fingerprint, save_snapshot
from mllm_jax.data.pipeline import Mixture, Pipeline
from mllm_jax.errors import TooFewError
from mllm_jax.generation.assistant import Assistant
from mllm_jax.models.params import placed_params
from mllm_jax.models.processor import Processor
from mllm_jax.sharding.chips import peak_flops
from mllm_jax.sharding.hosts import Share, from_first, is_first
from mllm_jax.training.config import Experiment, Stage
from mllm_jax.training.features import FeatureCaches
from mllm_jax.training.feed import Feed
from mllm_jax.training.hooks import (
    Best,
    Context,
    EarlyStopping,
    EvaluateTasks,
    Hook,
    Interrupt,
    ReportSteps,
    Save,
    StepDone,
    Stop,
    Trace,
    Validate,
)
from mllm_jax.training.operations.host import return_large_memory
from mllm_jax.training.operations.meter import Meter
from mllm_jax.training.operations.metrics_writer import MetricsWriter, Sink
from mllm_jax.training.operations.monitors import Monitors
from mllm_jax.training.operations.progress import Progress
from mllm_jax.training.partition import split
from mllm_jax.training.pretrained import describe_sources
from mllm_jax.training.stage import StageProgram, build_stage, hold_frozen, partition_of
from mllm_jax.training.step import TrainState


@dataclass(frozen=True)
class Prepared:
    """Everything that a stage needs before its first step.

    Attributes:
        trainable: the caller's own arrays, which no step donates.
        frozen: in the dtype in which the stage holds them.
        origin: fingerprints of the parameters that the stage begins with, and the sources of the frozen ones.
        packing: fill of the rows of its batches.
    """

    feed: Feed
    validation: Feed | None
    features: FeatureCaches | None
    program: StageProgram
    trainable: dict
    frozen: dict
    origin: dict[str, Any]
    packing: dict[str, float]


@dataclass(frozen=True)
class Start:
    """The position in a stage at which a start begins.

    Attributes:
        step: number of steps of the stage that are done.
        data: number of batches of the data that are done: equal to `step`, unless the number of rows has changed.
        best: of early stopping.
    """

    step: int
    data: int
    state: TrainState
    best: Best


@dataclass
class StageRunner:
    """One stage of a run; `run` trains it.

    Attributes:
        done_before: number of steps of the stages before this one.
        sinks: receive the metrics too.
        last: whether the run ends with this stage.
        cache_dir: folder for measured lengths; None: the run folder, which several processes share.
    """

    experiment: Experiment
    index: int
    folder: RunFolder
    processor: Processor
    mesh: Mesh
    progress: Progress
    by: Monitors
    done_before: int
    cache_dir: Path | None
    sinks: Sequence[Sink] = ()
    last: bool = True

    @property
    def stage(self) -> Stage:
        return self.experiment.stages[self.index]

    @property
    def config(self) -> Any:
        """The config of the composition that the stage trains."""
        return self.experiment.model_of(self.stage)

    def run(self, params: dict) -> tuple[dict, dict]:
        """Trains the stage from its newest checkpoint or from its start.

        Args:
            params: all parameters; they stay as they are.

        Returns:
            (the trained parameters, values for the report).
        """
        started = time.monotonic()
        ready = self.prepare(params)
        where = self.folder.checkpoints(self.index, self.stage.name)
        best = None if ready.validation is None else "validation_loss"
        checkpoints = TrainingCheckpoints(where, keep_last=self.experiment.checkpoint.keep_last, keep_best=best)
        start = self.restore(ready, checkpoints)
        reached, ahead = self.done_before + start.step, start.data - start.step
        self.by.goodput.resumed(reached)
        writer = MetricsWriter(self.folder.path, resume_from=reached, sinks=self.sinks) if is_first() else None
        meter = Meter(ready.program.flops(), self.mesh.devices.size, self.peak)
        context = Context(self.experiment, self.stage, self.done_before, writer, self.progress, self.by, meter)
        report = ReportSteps(context, lambda step: ready.feed.data.describe(step + ahead))
        hooks: list[Hook] = [report, Stop(self.by.stopping)]
        if ready.validation is not None:
            hooks.append(Validate(context, ready.validation, ready.program.eval_step, ready.frozen))
        patience = None if self.stage.patience is None else EarlyStopping(context, checkpoints, start.best)
        hooks += [Trace(self.by.profile)] if patience is None else [patience, Trace(self.by.profile)]
        if tasks := self.experiment.tasks_of(self.stage):
            assistant = Assistant(self.config.make(), None, self.words, mesh=self.mesh)
            hooks.append(EvaluateTasks(context, tasks, assistant, ready.frozen, ready.program.partition))
        save = Save(context, checkpoints, ready.origin, report, ahead=ahead, end=self.last)
        hooks += [save, Interrupt(context, checkpoints)]
        ended, state = self.loop(ready, start, report, hooks, over=patience is not None and patience.exhausted)
        with self.by.goodput.spending("checkpoint"):
            checkpoints.close()
        if patience is not None and patience.best.step not in (None, ended):
            del start, state  # frees memory for the best one
            _, restored, _ = checkpoints.restore({"state": ready.program.state}, patience.best.step)
            state = restored["state"]
        trained = ready.program.partition.trained(state.result, params)
        return self.finish(ready, trained, ended, context, patience, started)

    @property
    def words(self) -> Processor:
        """The processor of the stage's examples."""
        return self.processor.of_composition(self.config)

    @property
    def peak(self) -> float | None:
        """Peak FLOP/s of a device; None if unknown."""
        return peak_flops(self.mesh.devices.flat[0].device_kind, self.config.dtype)

    def prepare(self, params: dict) -> Prepared:
        """Measures the data, and builds the stage's program."""
        stage = self.stage
        data = self.pipeline(stage.data)
        validation = self.validation()
        model = self.config.make()
        placed = placed_params(model, self.mesh, self.experiment.part_rules)
        partition = partition_of(stage, model, self.words.tokenizer)
        own = {name: params[name] for name in placed}
        trainable, frozen = partition.split(own)
        # The rows of signal tokens begin as those of the frozen tables.
        origin = {"frozen": self.frozen_meta(frozen), "began": fingerprint(split(own, stage.trainable)[0])}
        frozen = hold_frozen(stage, frozen)
        features = (
            self.feature_caches(partition.join(trainable, frozen), origin["frozen"]) if stage.cache_features else None
        )
        feed = Feed(data, self.mesh, features)
        program = build_stage(self.experiment, self.index, self.mesh, feed.spec, placed, partition)
        packing = data.plan.statistics(64)
        dropped = sum(m.dropped_turns for m in data.measured)
        bad = sum(len(m.bad) for m in data.measured)
        return_large_memory(sum(program.sizes.values()))
        sizes = program.sizes.items()
        shown = ", ".join(f"{name.split('_')[0]} {size / 2**20:.2f} MiB" for name, size in sizes)
        self.progress.message(
            f"stage {stage.name}: {shown}; rows of {stage.data.length} filled to {packing['fill']:.1%}, "
            f"{packing['examples_per_step']:.0f} examples a step, left over {packing['left_over']:.2%}, "
            f"turns dropped for length {dropped}, bad records {bad}"
        )
        held_out = None if validation is None else Feed(validation, self.mesh, features)
        return Prepared(feed, held_out, features, program, trainable, frozen, origin, packing)

    def restore(self, ready: Prepared, checkpoints: TrainingCheckpoints) -> Start:
        """Reads the newest sound checkpoint: its step and state; without one, begins at step 0.

        Raises:
            CheckpointError: a checkpoint of a stage that began with other weights, or no sound one.
        """
        say, name, origin = self.progress.message, self.stage.name, ready.origin
        if from_first(checkpoints.latest()) is None:
            key = jax.random.fold_in(jax.random.key(self.experiment.seed), self.index)
            # Steps donate the state, but the parameters belong to the caller: the state starts with a copy.
            start = Start(
                0, 0, ready.program.init(jax.tree.map(lambda x: x.copy(), ready.trainable), key), self.best({})
            )
        else:
            where = self.folder.checkpoints(self.index, name)
            step, restored, meta = checkpoints.restore({"state": ready.program.state})
            saved = meta["frozen"]["fingerprint"]
            compare_fingerprints(origin["frozen"]["fingerprint"], saved, f"the frozen weights beside {where}")
            compare_fingerprints(origin["began"], meta["began"], f"the weights with which {where} began")
            best = self.best(meta.get("best") or {})
            if best.step is not None and best.step not in from_first(checkpoints.steps()):
                say(f"stage {name}: the checkpoint of its best step {best.step} is gone; its search starts anew")
                best = self.best({})
            before = meta["config"]["stages"][self.index]["data"]["rows"]
            start = Start(step, -(-meta["data_step"] * before // self.stage.data.rows), restored["state"], best)
            say(f"stage {name}: resumed at step {step}")
        for note in checkpoints.notes:
            say(note)
        return start

    def best(self, known: dict[str, Any]) -> Best:
        """Returns the best validation in a checkpoint; a new one if it was computed on other validation data."""
        validation = describe(self.stage.validation)
        return Best(**known) if known.get("validation") == validation and known else Best(validation=validation)

    def loop(
        self, ready: Prepared, start: Start, report: ReportSteps, hooks: Sequence[Hook], *, over: bool
    ) -> tuple[int, TrainState]:
        """Runs the stage's steps; step k is dispatched before the metrics of step k - 1 are read.

        Args:
            over: no step is left, because early stopping has ended the stage already.

        Returns:
            (the number of steps of the stage that are done, the state after them)

        Raises:
            Interrupted: the run was asked to stop; a checkpoint was saved.
        """
        account, step_fn, ended, state = self.by.goodput, ready.program.step, start.step, start.state
        steps = ended if over else self.stage.steps
        self.progress.stage(self.stage.name, self.stage.steps, ended)
        with self.by.watchdog, account.spending("productive"):
            read = ready.feed.iterate(start.data, start.data + steps - ended)
            batches = account.waited(read, report.computing)
            for step, (tokens, batch) in zip(range(ended, steps), batches, strict=True):
                for hook in hooks:
                    hook.before(step)
                with account.spending("compile" if step == start.step else "productive"):
                    state, metrics = step_fn(state, ready.frozen, batch)
                ended = step + 1
                done = StepDone(ended, ended == steps, state, metrics, tokens)
                for hook in hooks:
                    hook.after(done)
                if done.last:
                    break
            report.flush()
        return ended, state

    def finish(
        self,
        ready: Prepared,
        trained: dict,
        ended: int,
        context: Context,
        patience: EarlyStopping | None,
        started: float,
    ) -> tuple[dict, dict]:
        """Saves the stage's trained parameters permanently; returns them and the values for the report."""
        account, early = self.by.goodput, {}
        if ready.features is not None:
            ready.features.close()
        if patience is not None and (best := patience.best).step is not None:
            context.say(ended, f"the parameters of step {best.step} are kept, with validation loss {best.loss:.4f}")
            stopping = {"best_step": best.step, "validation_loss": best.loss, "stopped": ended < self.stage.steps}
            early = {"early_stopping": stopping | {"patience": self.stage.patience}}
        facts = {
            "name": self.stage.name,
            "steps": ended,
            "seconds": time.monotonic() - started,
            **ready.program.sizes,
            "tokens_per_second": context.meter.tokens_rate,
            "packing": ready.packing["fill"],
            "flops_per_step": context.meter.flops,
            **early,
        }
        with account.spending("checkpoint"):
            kept = {"facts": facts, **ready.origin, "fingerprint": fingerprint(trained)}
            save_snapshot(self.folder.snapshot(self.index, self.stage.name), trained, kept)
        account.reached(self.done_before + ended, saved=True)
        if context.writer:
            context.writer.close()
        return trained, facts

    def pipeline(self, mixture: Mixture, salt: int = 0) -> Pipeline:
        """Measures a mixture's examples."""
        shared = jax.process_count() > 1 or self.cache_dir is None
        return Pipeline(
            mixture,
            self.words,
            seed=(self.experiment.seed * 1009 + self.index) * 2 + salt,
            cache_dir=self.folder.lengths if shared else self.cache_dir,
            hosts=Share.of_run(),
            progress=self.progress,
        )

    def validation(self) -> Pipeline | None:
        """Measures the validation data; returns None if there is none.

        Raises:
            TooFewError: there is none, and early stopping needs it.
        """
        if self.stage.validation is None:
            return None
        try:
            return self.pipeline(self.stage.validation, salt=1)
        except TooFewError as error:
            if self.stage.patience is not None:
                raise
            self.progress.message(f"stage {self.stage.name}: no validation loss: {error.given}; {error.todo}")
            return None

    def frozen_meta(self, frozen: dict) -> dict:
        """Returns the sources and the fingerprint of the frozen parameters, to find and to check them."""
        sources = {"": f"init(seed={self.experiment.seed})"} | describe_sources(self.experiment)
        for i, earlier in enumerate(self.experiment.stages[: self.index]):
            sources |= {pattern: f"stages/{i}-{earlier.name}" for pattern in earlier.trainable}
        return {"sources": sources, "fingerprint": fingerprint(frozen)}

    def feature_caches(self, params: dict, frozen_meta: dict) -> FeatureCaches:
        """Opens the caches of the encoders' features, in folders named by the fingerprint of the frozen parameters."""
        key = repr([frozen_meta["fingerprint"], describe(self.config)])
        model, rules = self.config.make(), self.experiment.part_rules
        return FeatureCaches.of(self.folder.features, key, self.stage, model, params, self.mesh, rules)
