"""One stage of one run: prepare, restore, loop, finish."""

from __future__ import annotations

import hashlib
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
from mllm_jax.models.params import placed_params
from mllm_jax.models.processor import Processor
from mllm_jax.sharding.hosts import Hosts, from_first, is_first
from mllm_jax.training.config import Experiment, Stage
from mllm_jax.training.features import FeatureCache
from mllm_jax.training.feed import Feed
from mllm_jax.training.hooks import Context, Hook, Interrupt, Report, Save, StepDone, Stop, Trace, Validate
from mllm_jax.training.operations.meter import Meter
from mllm_jax.training.operations.metrics_writer import MetricsWriter
from mllm_jax.training.operations.monitors import Monitors
from mllm_jax.training.operations.progress import Progress
from mllm_jax.training.partition import join, split
from mllm_jax.training.pretrained import describe_sources
from mllm_jax.training.stage import StageProgram, build_stage, hold_frozen
from mllm_jax.training.step import TrainState


@dataclass(frozen=True)
class Prepared:
    """What a stage needs before its first step.

    Attributes:
        trainable: the caller's own arrays, which no step takes away.
        frozen: in the dtype in which the stage holds them.
        origin: fingerprints of what the stage begins with, and where the frozen parameters come from.
        packing: how full the rows of its batches are.
    """

    feed: Feed
    validation: Feed | None
    features: FeatureCache | None
    program: StageProgram
    trainable: dict
    frozen: dict
    origin: dict[str, Any]
    packing: dict[str, float]


@dataclass
class StageRunner:
    """One stage of a run; `run` trains it.

    Attributes:
        done_before: steps of the stages before this one.
        cache_dir: where measured lengths are kept; None: in the run folder, as where several processes share them.
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
            (the trained parameters, facts for the report).
        """
        started = time.monotonic()
        ready = self.prepare(params)
        where = self.folder.checkpoints(self.index, self.stage.name)
        best = None if ready.validation is None else "validation_loss"
        checkpoints = TrainingCheckpoints(where, keep_last=self.experiment.checkpoint.keep_last, keep_best=best)
        start, state = self.restore(ready, checkpoints)
        reached = self.done_before + start
        self.by.goodput.resumed(reached)
        writer = MetricsWriter(self.folder.path, resume_from=reached) if is_first() else None
        context = Context(self.experiment, self.stage, self.done_before, writer, self.progress, self.by)
        report = Report(context, Meter(ready.program.flops()), ready.feed.data.describe)
        hooks: list[Hook] = [report, Trace(self.by.profile), Stop(self.by.stopping)]
        if ready.validation is not None:
            hooks.append(Validate(context, ready.validation, ready.program.eval_step, ready.frozen))
        hooks += [Save(context, checkpoints, ready.origin, report), Interrupt(context, checkpoints)]
        state = self.loop(ready, start, state, report, hooks)
        return self.finish(ready, state, checkpoints, context, report.meter, started)

    def prepare(self, params: dict) -> Prepared:
        """Measures the data, and builds the stage's program."""
        stage = self.stage
        data = self.pipeline(stage.data)
        validation = self.pipeline(stage.validation, salt=1) if stage.validation else None
        placed = placed_params(self.config.make(), self.mesh, self.experiment.part_rules)
        trainable, frozen = split({name: params[name] for name in placed}, stage.trainable)
        origin = {"frozen": self.frozen_meta(frozen), "began": fingerprint(trainable)}
        frozen = hold_frozen(stage, frozen)
        features = self.feature_cache(join(trainable, frozen), origin["frozen"]) if stage.cache_features else None
        feed = Feed(data, self.mesh, features)
        program = build_stage(self.experiment, self.index, self.mesh, feed.spec, placed)
        packing = data.plan.statistics(64)
        dropped = sum(m.dropped_turns for m in data.measured)
        bad = sum(len(m.bad) for m in data.measured)
        sizes = program.sizes.items()
        shown = ", ".join(f"{name.split('_')[0]} {size / 2**20:.2f} MiB" for name, size in sizes)
        self.progress.message(
            f"stage {stage.name}: {shown}; rows of {stage.data.length} filled to {packing['fill']:.1%}, "
            f"{packing['examples_per_step']:.0f} examples a step, left over {packing['left_over']:.2%}, "
            f"turns dropped for length {dropped}, bad records {bad}"
        )
        held_out = None if validation is None else Feed(validation, self.mesh, features)
        return Prepared(feed, held_out, features, program, trainable, frozen, origin, packing)

    def restore(self, ready: Prepared, checkpoints: TrainingCheckpoints) -> tuple[int, TrainState]:
        """Gives the steps that are done and the state after them: of the newest sound checkpoint, or of the start.

        Raises:
            CheckpointError: a checkpoint of a stage that began with other weights, or no sound one.
        """
        say, name, origin = self.progress.message, self.stage.name, ready.origin
        if from_first(checkpoints.latest()) is None:
            key = jax.random.fold_in(jax.random.key(self.experiment.seed), self.index)
            # The state is donated step by step; the parameters stay the caller's, so the state starts from a copy.
            start, state = 0, ready.program.init(jax.tree.map(lambda x: x.copy(), ready.trainable), key)
        else:
            where = self.folder.checkpoints(self.index, name)
            start, restored, meta = checkpoints.restore({"state": ready.program.state})
            saved = meta["frozen"]["fingerprint"]
            compare_fingerprints(origin["frozen"]["fingerprint"], saved, f"the frozen weights beside {where}")
            compare_fingerprints(origin["began"], meta["began"], f"the weights with which {where} began")
            state = restored["state"]
            say(f"stage {name}: resumed at step {start}")
        for note in checkpoints.notes:
            say(note)
        return start, state

    def loop(self, ready: Prepared, start: int, state: TrainState, report: Report, hooks: Sequence[Hook]) -> TrainState:
        """Takes the stage's steps; step k is dispatched before the metrics of k - 1 are read.

        Raises:
            Interrupted: the run was asked to stop; a checkpoint was saved.
        """
        account, steps, step_fn = self.by.goodput, self.stage.steps, ready.program.step
        self.progress.stage(self.stage.name, steps, start)
        with self.by.watchdog, account.spending("productive"):
            batches = account.waited(ready.feed.iterate(start, steps), report.computing)
            for step, (tokens, batch) in zip(range(start, steps), batches, strict=True):
                for hook in hooks:
                    hook.before(step)
                with account.spending("compile" if step == start else "productive"):
                    state, metrics = step_fn(state, ready.frozen, batch)
                done = StepDone(step + 1, step + 1 == steps, state, metrics, tokens)
                for hook in hooks:
                    hook.after(done)
            report.flush()
        return state

    def finish(
        self,
        ready: Prepared,
        state: TrainState,
        checkpoints: TrainingCheckpoints,
        context: Context,
        meter: Meter,
        started: float,
    ) -> tuple[dict, dict]:
        """Keeps what the stage trained, for good; returns it and the facts for the report."""
        account = self.by.goodput
        with account.spending("checkpoint"):
            checkpoints.close()
        if ready.features is not None:
            ready.features.close()
        facts = {
            "name": self.stage.name,
            "steps": self.stage.steps,
            "seconds": time.monotonic() - started,
            **ready.program.sizes,
            "tokens_per_second": meter.tokens_rate,
            "packing": ready.packing["fill"],
            "flops_per_step": meter.flops,
        }
        with account.spending("checkpoint"):
            kept = {"facts": facts, **ready.origin, "fingerprint": fingerprint(state.params)}
            save_snapshot(self.folder.snapshot(self.index, self.stage.name), state.params, kept)
        account.reached(self.done_before + self.stage.steps, saved=True)
        if context.writer:
            context.writer.close()
        return state.params, facts

    def pipeline(self, mixture: Mixture, salt: int = 0) -> Pipeline:
        """Measures a mixture's examples."""
        shared = jax.process_count() > 1 or self.cache_dir is None
        return Pipeline(
            mixture,
            self.processor.of_composition(self.config),
            seed=(self.experiment.seed * 1009 + self.index) * 2 + salt,
            cache_dir=self.folder.lengths if shared else self.cache_dir,
            hosts=Hosts.of_run(),
            progress=self.progress,
        )

    def frozen_meta(self, frozen: dict) -> dict:
        """Where the frozen parameters come from and what they are: enough to find and to check them."""
        sources = {"": f"init(seed={self.experiment.seed})"} | describe_sources(self.experiment)
        for i, earlier in enumerate(self.experiment.stages[: self.index]):
            sources |= {pattern: f"stages/{i}-{earlier.name}" for pattern in earlier.trainable}
        return {"sources": sources, "fingerprint": fingerprint(frozen)}

    def feature_cache(self, params: dict, frozen_meta: dict) -> FeatureCache:
        """The encoder's features on disk, beside the run and under the name of what they come from."""
        key = hashlib.sha256(repr([frozen_meta["fingerprint"], describe(self.config)]).encode())
        folder = self.folder.features / key.hexdigest()[:16]
        return FeatureCache.of(folder, self.config.make(), params, self.mesh, self.experiment.part_rules)
