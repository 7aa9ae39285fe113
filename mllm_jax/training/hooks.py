"""What is done around each step of a stage, by small objects that the loop calls in the order of a list."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np

from mllm_jax.checkpoints.description import describe
from mllm_jax.checkpoints.training import TrainingCheckpoints
from mllm_jax.errors import TrainingError
from mllm_jax.training.config import Experiment, Stage
from mllm_jax.training.feed import Feed
from mllm_jax.training.operations.meter import Meter
from mllm_jax.training.operations.metrics_writer import MetricsWriter
from mllm_jax.training.operations.monitors import Monitors
from mllm_jax.training.operations.profiling import Profile
from mllm_jax.training.operations.progress import Progress
from mllm_jax.training.operations.stopping import Interrupted, Stopping
from mllm_jax.training.step import TrainState


@dataclass
class StepDone:
    """A step that was dispatched; a hook leaves here what the hooks after it, and the loop, need.

    Attributes:
        ended: steps of the stage that are done, with this one.
        last: whether it is the last of the stage.
        state: the state after the step, until the next step takes it away.
        metrics: of the step, on the devices: reading them waits for it.
        tokens: of the batch, over all processes.
        scores: mean metrics of a validation after the step; None: there was none.
        stop: whether the run stops here.
    """

    ended: int
    last: bool
    state: TrainState
    metrics: dict[str, jax.Array]
    tokens: int
    scores: dict[str, float] | None = None
    stop: bool = False


class Hook:
    """What a hook may do; it overrides what it needs."""

    def before(self, step: int) -> None:
        """Called before a step is dispatched, with its number in the stage."""

    def after(self, done: StepDone) -> None:
        """Called after each step was dispatched, while the devices still compute it."""


@dataclass(frozen=True)
class Context:
    """What the hooks of a stage share.

    Attributes:
        done_before: steps of the stages before this one.
        writer: None on processes other than the first.
    """

    experiment: Experiment
    stage: Stage
    done_before: int
    writer: MetricsWriter | None
    progress: Progress
    by: Monitors


class Report(Hook):
    """Writes and shows the metrics of a step once the next one is dispatched, so that the devices never wait for it.

    Raises:
        TrainingError: a loss or gradient that is not finite, with `nonfinite="stop"`.
    """

    def __init__(self, context: Context, meter: Meter, describe_batch: Callable[[int], str]):
        self.context, self.meter, self._describe = context, meter, describe_batch
        self._pending: tuple[int, dict, int] | None = None

    def after(self, done: StepDone) -> None:
        self.flush()
        self._pending = (done.ended - 1, done.metrics, done.tokens)

    def computing(self) -> bool:
        """Returns whether the devices still compute the latest step."""
        return self._pending is not None and not self._pending[1]["loss"].is_ready()

    def flush(self) -> None:
        """Reports the latest step, if that is not done yet; waits for it."""
        if self._pending is not None:
            self._report(*self._pending)
            self._pending = None

    def _report(self, step: int, metrics: dict, tokens: int) -> None:
        context, stage, ended = self.context, self.context.stage, step + 1
        account, writer = context.by.goodput, context.writer
        values = {name: float(value) for name, value in jax.device_get(metrics).items()}
        self.meter.tick(tokens)
        account.reached(context.done_before + ended)
        context.by.watchdog.beat(f"step {ended} of stage {stage.name}")
        if values["nonfinite"]:
            self._refuse_or_say(step, values)
        if writer and (values["nonfinite"] or ended % context.experiment.log_every == 0 or ended == stage.steps):
            timing = self.meter.timing() | account.timing()
            writer.write(context.done_before + ended, stage.name, values, timing)
        context.progress.update(
            ended,
            loss=values["loss"],
            tokens_per_second=self.meter.tokens_rate,
            flops_per_second=self.meter.flops_rate,
        )

    def _refuse_or_say(self, step: int, values: dict[str, float]) -> None:
        name = self.context.stage.name
        given = f"stage {name}, step {step}: loss {values['loss']}, gradient norm {values['grad_norm']}"
        if self.context.experiment.nonfinite == "stop":
            raise TrainingError(
                f"{given}; the batch: {self._describe(step)}",
                "finite numbers; the update was not applied",
                "look at these examples, lower the learning rate, or set nonfinite='skip'",
            )
        self.context.progress.message(f"{given}: skipped; the batch: {self._describe(step)}")


class Trace(Hook):
    """Traces a few steps for `--profile`."""

    def __init__(self, profile: Profile):
        self.profile = profile
        profile.next_stage()

    def before(self, step: int) -> None:
        self.profile.before(step)

    def after(self, done: StepDone) -> None:
        self.profile.after(done.ended - 1, done.metrics, last=done.last)


class Stop(Hook):
    """Says whether the run stops after a step; all processes agree on it. After the last step the stage ends anyway."""

    def __init__(self, stopping: Stopping):
        self.stopping = stopping

    def after(self, done: StepDone) -> None:
        done.stop = self.stopping.after_step() and not done.last


class Validate(Hook):
    """Computes the validation metrics of a stage every few steps and after its last one."""

    def __init__(self, context: Context, feed: Feed, eval_step: Callable, frozen: dict):
        self.context, self.feed, self.eval_step, self.frozen = context, feed, eval_step, frozen

    def after(self, done: StepDone) -> None:
        if done.last or done.ended % self.context.stage.validate_every == 0:
            with self.context.by.goodput.spending("other"):
                done.scores = self._validate(done.state.params, self.context.done_before + done.ended)

    def _validate(self, params: dict, step: int) -> dict[str, float]:
        """Mean metrics by weight, named and written as `validation_...`."""
        context, total = self.context, {}
        for i in range(context.stage.validation_batches):
            values = jax.device_get(self.eval_step(params, self.frozen, self.feed.batch(i)))
            context.by.watchdog.beat(f"validation batch {i + 1} after step {step}")
            for name, value in values.items():
                scale = float(values["weight"]) if name != "weight" else 1.0
                total[name] = total.get(name, 0.0) + float(value) * scale
        weight = total.pop("weight")
        means = {f"validation_{name}": value / weight for name, value in total.items()}
        if context.writer:
            context.writer.write(step, context.stage.name, means, {})
        return means


class Save(Hook):
    """Saves a checkpoint every few steps and where the run stops; the stage's end is kept as a snapshot instead.

    Args:
        origin: what the stage began with, kept with each checkpoint.
    """

    def __init__(self, context: Context, checkpoints: TrainingCheckpoints, origin: dict[str, Any], report: Report):
        self.context, self.checkpoints, self.origin, self.report = context, checkpoints, origin, report

    def after(self, done: StepDone) -> None:
        due = done.stop or done.ended % self.context.experiment.checkpoint.every_steps == 0
        if due and not done.last:
            self.report.flush()
            self._save(done)

    def _save(self, done: StepDone) -> None:
        context = self.context
        meta = {
            "stage": context.stage.name,
            "step": done.ended,
            "data_step": done.ended,
            "key": np.asarray(jax.device_get(done.state.key)).ravel().tolist(),
            "config": describe(context.experiment),
            **self.origin,
        }
        with context.by.goodput.spending("checkpoint"):
            self.checkpoints.save(done.ended, {"state": done.state}, meta, done.scores)
            if context.writer:
                context.writer.flush()
        context.by.goodput.reached(context.done_before + done.ended, saved=True)
        context.by.watchdog.beat(f"the checkpoint of step {done.ended} of stage {context.stage.name}")


class Interrupt(Hook):
    """Ends the run where it stops.

    Raises:
        Interrupted: a checkpoint was saved, and all files are closed.
    """

    def __init__(self, context: Context, checkpoints: TrainingCheckpoints):
        self.context, self.checkpoints = context, checkpoints

    def after(self, done: StepDone) -> None:
        if not done.stop:
            return
        account, stage = self.context.by.goodput, self.context.stage
        with account.spending("checkpoint"):
            self.checkpoints.close()
        if self.context.writer:
            self.context.writer.close()
        account.write()
        raise Interrupted(f"stopped at step {done.ended} of stage {stage.name}; the same command goes on from there")
