"""Hooks: small objects that the loop calls before and after each step of a stage, in the order of a list."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import jax
import numpy as np

from mllm_jax.checkpoints.description import describe
from mllm_jax.checkpoints.training import TrainingCheckpoints
from mllm_jax.errors import TooFewError, TrainingError
from mllm_jax.generation.assistant import Assistant
from mllm_jax.training.config import Experiment, Stage
from mllm_jax.training.evaluation import EVALUATION, Evaluation
from mllm_jax.training.feed import Feed
from mllm_jax.training.operations.meter import Meter
from mllm_jax.training.operations.metrics_writer import MetricsWriter
from mllm_jax.training.operations.monitors import Monitors
from mllm_jax.training.operations.profiling import Profile
from mllm_jax.training.operations.progress import Progress
from mllm_jax.training.operations.stopping import Interrupted, Stopping
from mllm_jax.training.partition import Partition
from mllm_jax.training.step import TrainState


@dataclass
class StepDone:
    """A step that was dispatched; hooks write here what later hooks and the loop need.

    Attributes:
        ended: number of steps of the stage that are done, including this one.
        last: whether it is the last of the stage.
        state: the state after the step; the next step donates it.
        metrics: of the step, on the devices: reading them waits for the step.
        tokens: number of tokens of the batch, over all processes.
        scores: mean metrics of a validation after the step; None: there was none.
        stop: whether the run stops here.
        best: the best validation so far, of a stage with early stopping.
        improved: whether the best validation followed this step.
    """

    ended: int
    last: bool
    state: TrainState
    metrics: dict[str, jax.Array]
    tokens: int
    scores: dict[str, float] | None = None
    stop: bool = False
    best: Best | None = None
    improved: bool = False


@dataclass(frozen=True)
class Best:
    """The best validation of a stage with early stopping, kept with each checkpoint.

    Attributes:
        step: number of steps of the stage that were done; None: no loss was finite yet.
        since: number of validations after it.
        validation: describes its data; losses on other data cannot be compared.
    """

    step: int | None = None
    loss: float | None = None
    since: int = 0
    validation: Any = None

    def after(self, step: int, loss: float) -> Best:
        """Returns the best after one more validation."""
        better = math.isfinite(loss) and (self.loss is None or loss < self.loss)
        return replace(self, step=step, loss=loss, since=0) if better else replace(self, since=self.since + 1)


class Hook:
    """Base class of hooks, which override the methods that they need."""

    def before(self, step: int) -> None:
        """Runs before a step is dispatched, with its number in the stage."""

    def after(self, done: StepDone) -> None:
        """Runs after a step was dispatched, while the devices still compute it."""


@dataclass(frozen=True)
class Context:
    """State that the hooks of a stage share.

    Attributes:
        done_before: number of steps of the stages before this one.
        writer: None on processes other than the first.
        meter: measures the stage's speed.
    """

    experiment: Experiment
    stage: Stage
    done_before: int
    writer: MetricsWriter | None
    progress: Progress
    by: Monitors
    meter: Meter

    def say(self, ended: int, text: str) -> None:
        """Prints a line about the state after a step."""
        self.progress.message(f"stage {self.stage.name}, step {ended}: {text}")


class ReportSteps(Hook):
    """Writes and shows the metrics of a step after the next one is dispatched, so that the devices never wait for it.

    Raises:
        TrainingError: a loss or gradient that is not finite, with `nonfinite="stop"`.
    """

    def __init__(self, context: Context, describe_batch: Callable[[int], str]):
        self.context, self._describe = context, describe_batch
        self._pending: StepDone | None = None

    def after(self, done: StepDone) -> None:
        self.flush()
        self._pending = done

    def computing(self) -> bool:
        """Returns whether the devices still compute the latest step."""
        return self._pending is not None and not self._pending.metrics["loss"].is_ready()

    def flush(self) -> None:
        """Waits for the latest step and reports it, unless it is reported already."""
        if self._pending is not None:
            self._report(self._pending)
            self._pending = None

    def _report(self, done: StepDone) -> None:
        context, stage, ended = self.context, self.context.stage, done.ended
        account, writer = context.by.goodput, context.writer
        values = {name: float(value) for name, value in jax.device_get(done.metrics).items()}
        context.meter.tick(done.tokens)
        account.reached(context.done_before + ended)
        context.by.watchdog.beat(f"step {ended} of stage {stage.name}")
        if values["nonfinite"]:
            self._refuse_or_say(ended - 1, values)
        timing = context.meter.timing()
        if writer and (values["nonfinite"] or ended % context.experiment.log_every == 0 or done.last):
            writer.write(context.done_before + ended, stage.name, values, timing | account.timing())
        context.progress.update(ended, loss=values["loss"], timing=timing, last=done.last)

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
    """A trace of a few steps for `--profile`."""

    def __init__(self, profile: Profile):
        self.profile = profile
        profile.next_stage()

    def before(self, step: int) -> None:
        self.profile.before(step)

    def after(self, done: StepDone) -> None:
        self.profile.after(done.ended - 1, done.metrics, last=done.last)


class Stop(Hook):
    """Decides, for all processes, whether the run stops after a step; the stage ends after its last step anyway."""

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
                done.scores = self._validate(done.state.result, self.context.done_before + done.ended)
            self.context.meter.pause()
            loss = done.scores["validation_loss"]
            self.context.say(done.ended, f"validation loss {loss:.4f}")

    def _validate(self, params: dict, step: int) -> dict[str, float]:
        """Returns the mean metrics by weight, named `validation_...`, and writes them."""
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


class EarlyStopping(Hook):
    """Ends a stage whose validation loss has not become smaller for `Stage.patience` validations.

    Args:
        best: the best validation in the checkpoint that the stage continues from.
    """

    def __init__(self, context: Context, checkpoints: TrainingCheckpoints, best: Best):
        self.context, self.checkpoints, self.best = context, checkpoints, best
        checkpoints.pinned = best.step

    @property
    def exhausted(self) -> bool:
        """True if early stopping has ended the stage."""
        return self.best.since >= self.context.stage.patience

    def after(self, done: StepDone) -> None:
        if done.scores is not None:
            self.best = self.best.after(done.ended, done.scores["validation_loss"])
            done.improved, self.checkpoints.pinned = self.best.since == 0, self.best.step
            if self.exhausted and not done.last:
                done.last = True
                self.context.say(done.ended, f"no smaller validation loss for {self.best.since} validations: it ends")
        done.best = self.best


class EvaluateTasks(Hook):
    """Evaluates the current parameters by tasks of the experiment's evaluation, every few steps.

    Every process takes part, as in the evaluation at the end of a run. The state of training does not change.

    Args:
        tasks: see `mllm_jax.training.evaluation.Evaluation`.
        assistant: runs the stage's composition; has no parameters of its own.
        frozen, partition: the frozen parameters, and how they and the trained ones make up the whole.
    """

    def __init__(
        self,
        context: Context,
        tasks: Sequence[Evaluation],
        assistant: Assistant,
        frozen: dict,
        partition: Partition,
    ):
        self.context, self.tasks, self.assistant = context, tasks, assistant
        self.frozen, self.partition = frozen, partition

    def after(self, done: StepDone) -> None:
        context, stage = self.context, self.context.stage
        if done.ended % stage.evaluate_every:
            return
        with context.by.goodput.spending("other"):
            asked, found = self.assistant.with_params(self.partition.join(done.state.result, self.frozen)), {}
            for task in self.tasks:
                try:
                    measured = task.measure(asked, limit=stage.evaluate_limit)
                except TooFewError as error:
                    context.say(done.ended, f"left out {task.name}: {error.given}")
                    continue
                context.by.watchdog.beat(f"task {task.name} after step {done.ended} of stage {stage.name}")
                found[task.name] = measured.metrics
        context.meter.pause()
        for name, metrics in found.items():
            context.say(done.ended, f"{name}: " + ", ".join(f"{key} {value:.4g}" for key, value in metrics.items()))
        if context.writer and found:
            values = {f"{EVALUATION}{name}/{key}": x for name, metrics in found.items() for key, x in metrics.items()}
            context.writer.write(context.done_before + done.ended, stage.name, values, {})


class Save(Hook):
    """Saves a checkpoint every few steps, when the run stops, and after the best validation of early stopping.

    Args:
        origin: describes what the stage began with; kept with each checkpoint.
        ahead: number of batches by which the data is ahead of the steps, if the number of rows has changed.
        end: whether the stage's end is saved too, so that more steps can follow it; its parameters are kept anyway.
    """

    def __init__(
        self,
        context: Context,
        checkpoints: TrainingCheckpoints,
        origin: dict[str, Any],
        report: ReportSteps,
        *,
        ahead: int = 0,
        end: bool = False,
    ):
        self.context, self.checkpoints, self.origin, self.report = context, checkpoints, origin, report
        self.ahead, self.end = ahead, end

    def after(self, done: StepDone) -> None:
        due = done.stop or done.improved or done.ended % self.context.experiment.checkpoint.every_steps == 0
        if self.end if done.last else due:
            self.report.flush()
            self._save(done)

    def _save(self, done: StepDone) -> None:
        context = self.context
        meta = {
            "stage": context.stage.name,
            "step": done.ended,
            "data_step": done.ended + self.ahead,
            "best": None if done.best is None else asdict(done.best),
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
    """Ends the run after the step at which it stops.

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
        raise Interrupted(f"stopped at step {done.ended} of stage {stage.name}; the same command continues from there")
