"""The loop and the planner share a stage's program; its hooks run in the order of the list."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import replace
from types import SimpleNamespace

import jax
import pytest
from toy_data import IMAGES, MODEL, pipeline

from mllm_jax.errors import ConfigError
from mllm_jax.layers.compute import Compute
from mllm_jax.models.params import init_params
from mllm_jax.planning.compile import abstract_step
from mllm_jax.sharding.mesh import MeshConfig, make_mesh
from mllm_jax.training.config import CheckpointConfig, Experiment, Stage, TokenizerConfig
from mllm_jax.training.feed import Feed
from mllm_jax.training.hooks import Best, Context, EarlyStopping, Hook, Interrupt, Save, StepDone, Stop, Validate
from mllm_jax.training.objectives.next_token import NextToken
from mllm_jax.training.operations.stopping import Interrupted
from mllm_jax.training.partition import num_bytes
from mllm_jax.training.stage import build_stage, hold_frozen

STAGE = Stage("talk", NextToken(), ("projector_image/*", "llm/*"), IMAGES, steps=6, frozen_dtype="bfloat16")
EXPERIMENT = Experiment("small", MODEL, (STAGE,), TokenizerConfig(vocab_size=320))


def test_the_planner_compiles_what_the_loop_runs():
    """Checks that the program from the config alone equals the one from data and parameters, to the letter."""
    mesh = make_mesh(MeshConfig(fsdp=2, data=1), jax.devices()[:2])
    planned = abstract_step(EXPERIMENT, 0, mesh)
    feed = Feed(pipeline(), mesh)
    params, shardings = init_params(MODEL.make(), mesh, seed=0)
    placed = jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), params, shardings)
    run = build_stage(EXPERIMENT, 0, mesh, feed.spec, placed)
    for name in ("state", "frozen", "batch"):
        assert jax.tree.all(jax.tree.map(lambda a, b: a == b, getattr(planned, name), getattr(run, name))), name
    lowered = [program.step.lower(program.state, program.frozen, program.batch).as_text() for program in (planned, run)]
    assert lowered[0] == lowered[1]
    frozen = hold_frozen(STAGE, {"encoder_image": params["encoder_image"]})
    for tree in (frozen, run.frozen):
        assert {leaf.dtype.name for leaf in jax.tree.leaves(tree)} == {"bfloat16"}
    whole = sum(num_bytes(params[part]) for part in run.frozen)
    assert run.sizes["frozen_bytes"] * 2 == whole, "float32 parameters are held in half the bytes"
    parts = run.flops_by_part(sorted(params))
    assert sum(part.total for part in parts.values()) == run.flops() > 0
    assert parts["encoder_image"].backward == 0 < parts["projector_image"].backward


def test_remat_is_not_counted():
    mesh = make_mesh(MeshConfig(data=1), jax.devices()[:1])
    again = replace(EXPERIMENT, model=replace(MODEL, llm=replace(MODEL.llm, compute=Compute(remat="full"))))
    assert abstract_step(again, 0, mesh).flops() == abstract_step(EXPERIMENT, 0, mesh).flops()


def test_a_pattern_that_matches_nothing_is_refused():
    wrong = replace(EXPERIMENT, stages=(replace(STAGE, trainable=("projektor/*",)),))
    with pytest.raises(ConfigError, match=r"projektor/\*"):
        abstract_step(wrong, 0, make_mesh(MeshConfig(data=1), jax.devices()[:1]))


# ---- hooks


class Recorder:
    """A hook that records all calls."""

    def __init__(self, seen: list, name: str):
        self._seen, self._name = seen, name

    def __getattr__(self, method):
        return lambda *given, **_: self._seen.append((f"{self._name}.{method}", *given[:1])) or nullcontext()


@pytest.fixture
def seen():
    return []


def context(seen, **stage) -> Context:
    by = SimpleNamespace(goodput=Recorder(seen, "account"), watchdog=Recorder(seen, "watchdog"))
    shown = Recorder(seen, "progress")
    experiment = replace(EXPERIMENT, stages=(replace(STAGE, **stage),), checkpoint=CheckpointConfig(every_steps=2))
    return Context(experiment, experiment.stages[0], 10, Recorder(seen, "writer"), shown, by, Recorder(seen, "meter"))


def done(ended: int, **given) -> StepDone:
    state = SimpleNamespace(key=jax.random.key_data(jax.random.key(0)), result="average")
    return StepDone(ended, ended == STAGE.steps, state, {}, 7, **given)


def take(hooks: list[Hook], steps: list[StepDone]) -> None:
    for step in steps:
        for hook in hooks:
            hook.after(step)


def test_checkpoints_come_every_few_steps_but_not_at_the_stages_end(seen):
    save = Save(context(seen), Recorder(seen, "checkpoints"), {}, Recorder(seen, "report"))
    take([save], [done(ended) for ended in range(1, 7)])
    assert [call for call in seen if call[0] == "checkpoints.save"] == [("checkpoints.save", n) for n in (2, 4)]
    names = [name for name, *_ in seen]
    first = names.index("checkpoints.save")
    assert names.index("report.flush") < first < names.index("writer.flush"), "what is saved was reported before"
    assert ("account.reached", 12) in seen


def test_the_last_stages_end_is_saved_so_that_more_steps_can_follow(seen):
    save = Save(context(seen), Recorder(seen, "checkpoints"), {}, Recorder(seen, "report"), end=True)
    take([save], [done(ended) for ended in range(1, 7)])
    assert [call[1] for call in seen if call[0] == "checkpoints.save"] == [2, 4, 6]


def test_early_stopping_counts_validations_without_a_smaller_loss(seen):
    stage, nan = dict(patience=2, validation=IMAGES), float("nan")
    patience = EarlyStopping(context(seen, **stage), checkpoints := SimpleNamespace(pinned=None), Best())
    steps = [done(n, scores=None if x is None else {"validation_loss": x}) for n, x in enumerate([nan, 2.0, None, 1.0])]
    take([patience], steps)
    assert [(step.best.step, step.best.since, step.improved, step.last) for step in steps] == [
        (None, 1, False, False),
        (1, 0, True, False),
        (1, 0, False, False),
        (3, 0, True, False),
    ]
    assert checkpoints.pinned == 3
    again = EarlyStopping(context(seen, **stage), checkpoints, replace(steps[-1].best, since=1))  # as in a checkpoint
    assert not again.exhausted
    take([again], [last := done(5, scores={"validation_loss": 1.0})])
    assert last.last and again.exhausted and again.best.step == 3
    assert any("no smaller validation loss for 2 validations" in str(call) for call in seen)


def test_a_stop_saves_and_then_ends_the_run(seen):
    asked = SimpleNamespace(after_step=lambda: True)
    checkpoints = Recorder(seen, "checkpoints")
    here = context(seen)
    hooks = [Stop(asked), Save(here, checkpoints, {}, Recorder(seen, "report")), Interrupt(here, checkpoints)]
    take(hooks, [done(6)])
    assert seen == [], "after the last step the stage ends anyway"
    with pytest.raises(Interrupted, match="stopped at step 3 of stage talk"):
        take(hooks, [done(3)])
    order = [name for name, *_ in seen if name in ("checkpoints.save", "checkpoints.close", "writer.close")]
    assert order == ["checkpoints.save", "checkpoints.close", "writer.close"]


def test_validation_is_a_mean_by_weight(seen):
    values = {0: {"loss": 1.0, "weight": 1.0}, 1: {"loss": 5.0, "weight": 3.0}}
    feed = SimpleNamespace(batch=lambda number: number)
    written = []
    here = replace(
        context(seen, validate_every=4, validation_batches=2),
        writer=SimpleNamespace(write=lambda *given: written.append(given)),
    )

    def eval_step(params, frozen, batch):
        assert params == "average", "of a stage with `ema`"
        return values[batch]

    steps = [done(ended) for ended in range(1, 7)]
    take([Validate(here, feed, eval_step, {})], steps)
    assert [step.scores for step in steps] == [
        None,
        None,
        None,
        {"validation_loss": 4.0},
        None,
        {"validation_loss": 4.0},
    ]
    assert [(step, means) for step, _, means, _ in written] == [(n, {"validation_loss": 4.0}) for n in (14, 16)]
