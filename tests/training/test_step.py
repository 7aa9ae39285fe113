"""The train step: compiled once, donated, sharded from the start, without changes to frozen parameters, NaN-safe."""

from __future__ import annotations

import os
import signal
from dataclasses import dataclass, replace
from functools import lru_cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_runs import metrics
from toy_data import DUAL, IMAGES, MODEL, PAIRS, pipeline, quick_compilation, tokenizer

from mllm_jax.checkpoints.run import read_json
from mllm_jax.checkpoints.training import fingerprint, snapshot_meta
from mllm_jax.errors import TrainingError
from mllm_jax.models.params import init_params
from mllm_jax.sharding.mesh import MeshConfig, make_mesh
from mllm_jax.training import loop, stage_run
from mllm_jax.training.config import AdamW, CheckpointConfig, Experiment, Stage, TokenizerConfig
from mllm_jax.training.objectives.contrastive import Contrastive
from mllm_jax.training.objectives.next_token import NextToken
from mllm_jax.training.operations.stopping import Interrupted
from mllm_jax.training.optimizer import learning_rate, make_optimizer
from mllm_jax.training.partition import num_bytes, split
from mllm_jax.training.step import (
    TrainState,
    init_state,
    make_eval_step,
    make_train_step,
    place_batch,
    state_shardings,
)

STEPS = 6
ADAMW = AdamW(learning_rate=2e-3, warmup_steps=2)
TRAINABLE = ("projector_image/*", "llm/*")
ONE = MeshConfig(data=1)
NEXT_TOKEN = NextToken()


@pytest.fixture(scope="module", autouse=True)
def _quick():
    with quick_compilation():
        yield


@dataclass(frozen=True)
class Poisoned:
    """Next-token objective with a NaN loss for batches with these sums of tokens."""

    marks: tuple[int, ...] = ()

    def check(self, stage, model):
        NextToken().check(stage, model)

    def loss(self, apply, params, batch, key):
        value, metrics = NextToken().loss(apply, params, batch, key)
        poison = jnp.isin(batch["tokens"].sum(), jnp.array(self.marks, jnp.int32))
        return jnp.where(poison, jnp.nan, value), metrics


@lru_cache
def mark(step: int) -> int:
    return int(pipeline().batch(step)["tokens"].sum())


def learnt(step: int, seed: int = 0) -> float:
    return float(pipeline(seed=seed).batch(step)["loss_weights"].sum())


class Setup:
    """A compiled step on a mesh, and fresh states for it."""

    def __init__(self, mesh_config=ONE, model=MODEL, objective=NEXT_TOKEN, frozen_dtype=None):
        self.mesh = make_mesh(mesh_config, jax.devices()[:1] if mesh_config == ONE else None)
        self.model, self.data = model.make(), pipeline()
        self.params, shardings = init_params(self.model, self.mesh, seed=0)
        trainable, self.frozen = split(self.params, TRAINABLE)
        if frozen_dtype:
            self.frozen = jax.tree.map(lambda x: x.astype(frozen_dtype), self.frozen)
        self.optimizer, schedule = make_optimizer(ADAMW, STEPS), learning_rate(ADAMW, STEPS)
        self.layout = state_shardings(self.optimizer, trainable, split(shardings, TRAINABLE)[0], self.mesh)
        self.step_fn = make_train_step(
            self.model, objective, self.optimizer, schedule, mesh=self.mesh, shardings=self.layout
        )

    def state(self) -> TrainState:
        trainable = jax.tree.map(lambda x: x.copy(), split(self.params, TRAINABLE)[0])
        return init_state(self.optimizer, trainable, self.layout, jax.random.key(0))

    def batch(self, step: int) -> dict:
        return place_batch(self.data.batch(step), self.mesh, self.data.spec, list(range(8)))

    def losses(self, steps: int = STEPS) -> np.ndarray:
        state, found = self.state(), []
        for step in range(steps):
            state, values = self.step_fn(state, self.frozen, self.batch(step))
            found.append(float(values["loss"]))
        return np.array(found)


@pytest.fixture(scope="module")
def one() -> Setup:
    """Makes a step on one device; the batch of step 2 is poisoned."""
    marks = [mark(step) for step in range(STEPS)]
    assert marks.count(marks[2]) == 1
    return Setup(objective=Poisoned((mark(2),)))


@pytest.fixture(scope="module")
def plain() -> Setup:
    return Setup()


def bits(tree) -> list[bytes]:
    return [np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(tree)]


def test_batches_of_different_content_do_not_recompile(plain):
    state, compiled = plain.state(), []
    state, _ = plain.step_fn(state, plain.frozen, plain.batch(0))
    batches = [plain.batch(step) for step in (1, 2, 3)]
    jax.monitoring.register_event_duration_secs_listener(lambda name, *_, **__: compiled.append(name))
    for batch in batches:
        state, _ = plain.step_fn(state, plain.frozen, batch)
    assert not [name for name in compiled if "compile" in name]
    assert plain.step_fn._cache_size() == 1
    jax.jit(lambda x: x + 7)(1.0)  # the listener is called for a compilation
    assert [name for name in compiled if "compile" in name]
    compiled.clear()


def test_the_state_is_donated(plain):
    before = plain.state()
    after, _ = plain.step_fn(before, plain.frozen, plain.batch(0))
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves((before.params, before.opt_state)))
    assert not any(leaf.is_deleted() for leaf in jax.tree.leaves((after, plain.frozen, plain.params)))
    assert int(after.step) == 1


def test_frozen_parameters_cost_no_state_and_do_not_change(plain):
    state, frozen = plain.state(), bits(plain.frozen)
    moments = [leaf for leaf in jax.tree.leaves(state.opt_state) if leaf.ndim]
    counters = [leaf for leaf in jax.tree.leaves(state.opt_state) if not leaf.ndim]
    assert num_bytes(moments) == 2 * num_bytes(state.params)
    assert num_bytes(counters) < 32 and num_bytes(plain.frozen) > 0
    assert num_bytes(state.params) + num_bytes(plain.frozen) == num_bytes(plain.params)
    before = bits(state.params)
    for step in range(3):
        state, _ = plain.step_fn(state, plain.frozen, plain.batch(step))
    assert bits(plain.frozen) == frozen
    assert all(a != b for a, b in zip(bits(state.params), before, strict=True)), "a trainable leaf did not move"


def test_frozen_parameters_in_bfloat16(plain):
    half = Setup(frozen_dtype="bfloat16")
    assert {leaf.dtype for leaf in jax.tree.leaves(half.frozen)} == {jnp.dtype("bfloat16")}
    assert num_bytes(half.frozen) * 2 == num_bytes(plain.frozen)
    assert {leaf.dtype for leaf in jax.tree.leaves(half.state().params)} == {jnp.dtype("float32")}
    found, expected = half.losses(), plain.losses()
    np.testing.assert_allclose(found, expected, rtol=2e-3)
    assert (found != expected).any()


def test_bfloat16_compute_keeps_float32_masters(plain):
    half = Setup(model=MODEL.with_dtype("bfloat16"))
    state, _ = half.step_fn(half.state(), half.frozen, half.batch(0))
    masters = jax.tree.leaves((state.params, [x for x in jax.tree.leaves(state.opt_state) if x.ndim]))
    assert {leaf.dtype for leaf in masters} == {jnp.dtype("float32")}
    assert "bf16" in half.step_fn.lower(state, half.frozen, half.batch(0)).as_text()
    found, expected = half.losses(), plain.losses()
    np.testing.assert_allclose(found, expected, rtol=1e-2)
    assert (found != expected).any()


def test_a_loss_that_is_not_finite_is_never_applied(one):
    state = one.state()
    for step in range(STEPS):
        before, moments = bits(state.params), bits(state.opt_state)
        state, values = one.step_fn(state, one.frozen, one.batch(step))
        assert int(state.step) == step + 1
        assert float(values["nonfinite"]) == (step == 2) == np.isnan(float(values["loss"]))
        assert (bits(state.params) == before) == (step in (0, 2)), "step 0 has learning rate 0"
        assert (bits(state.opt_state) == moments) == (step == 2)


def test_a_gradient_that_is_not_finite_is_never_applied(one):
    """Checks a gradient of NaN with a finite loss."""
    state = one.state()
    poisoned = jax.tree.map(lambda x: x.copy(), state.params)
    poisoned["llm"]["final_norm"]["scale"] = poisoned["llm"]["final_norm"]["scale"].at[0].set(jnp.inf)
    state = state.replace(params=poisoned)
    before = bits(poisoned)
    state, values = one.step_fn(state, one.frozen, one.batch(0))
    assert float(values["nonfinite"]) == 1 and not np.isfinite(float(values["grad_norm"]))
    assert bits(state.params) == before


@pytest.mark.parametrize("config", [MeshConfig(data=1, fsdp=8), MeshConfig(data=2, fsdp=2, tensor=2)], ids=str)
def test_no_device_holds_a_whole_sharded_parameter(config, devices):
    mesh = make_mesh(config)
    params, shardings = init_params(MODEL.make(), mesh, seed=0)
    optimizer = make_optimizer(ADAMW, STEPS, ema=0.9)
    layout = state_shardings(optimizer, params, shardings, mesh)
    state = init_state(optimizer, params, layout, jax.random.key(0))
    split_leaves = 0
    for leaf, sharding in zip(jax.tree.leaves(state), jax.tree.leaves(layout), strict=True):
        ways = [mesh.shape[a] for part in sharding.spec if part for a in (part if isinstance(part, tuple) else (part,))]
        assert {shard.data.size * int(np.prod(ways)) for shard in leaf.addressable_shards} == {leaf.size}
        assert len(leaf.addressable_shards) == 8
        split_leaves += bool(ways)
    assert split_leaves > 20
    held = sum(leaf.addressable_shards[0].data.nbytes for leaf in jax.tree.leaves(params))
    assert held < 0.6 * num_bytes(params)


def test_validation_changes_nothing_and_agrees_with_training(plain):
    state, before = plain.state(), bits(plain.params)
    eval_fn = make_eval_step(plain.model, NextToken(), mesh=plain.mesh)
    values = eval_fn(state.params, plain.frozen, plain.batch(0))
    _, trained = plain.step_fn(state, plain.frozen, plain.batch(0))
    assert float(values["loss"]) == pytest.approx(float(trained["loss"]), rel=1e-6)
    assert float(values["weight"]) == learnt(0)
    assert bits(plain.params) == before


# ---- the loop around it


def experiment(tmp_path, objective=NEXT_TOKEN, **change) -> Experiment:
    """Makes two stages on toy data; the seed of a stage's data is its index."""
    file = tmp_path / "tokenizer.json"
    tokenizer().save(file)
    stage = Stage("first", objective, TRAINABLE, IMAGES, STEPS, ADAMW)
    pairs = Stage("second", Contrastive(), ("heads/*",), PAIRS, 2, ADAMW, model=DUAL)
    settings = dict(
        name="toy",
        model=MODEL,
        stages=(stage, pairs),
        tokenizer=TokenizerConfig(320, str(file)),
        mesh=ONE,
        log_every=1,
        checkpoint=CheckpointConfig(every_steps=100),
    )
    return Experiment(**(settings | change))


def train(tmp_path, config: Experiment):
    return loop.train(config, tmp_path / "run", devices=jax.devices()[:1])


def test_the_loop_stops_at_nan_and_names_the_batch(tmp_path):
    config = experiment(tmp_path, Poisoned((mark(2),)))
    with pytest.raises(TrainingError, match="stage first, step 2: loss nan") as refused:
        train(tmp_path, config)
    assert pipeline().describe(2) in str(refused.value)
    assert [line["step"] for line in metrics(tmp_path / "run")] == [1, 2]


def test_the_loop_skips_nan_if_told_and_a_signal_at_a_stages_end_stops_before_the_next(tmp_path, capsys, monkeypatch):
    config = experiment(tmp_path, Poisoned((mark(2),)), nonfinite="skip")
    save = stage_run.save_snapshot

    def save_and_signal(*args):
        save(*args)
        os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(stage_run, "save_snapshot", save_and_signal)
    with pytest.raises(Interrupted, match="stopped after stage first"):
        train(tmp_path, config)
    printed = " ".join(capsys.readouterr().out.split())
    assert "stage first, step 2: loss nan" in printed and ": skipped; the batch: " in printed
    lines = metrics(tmp_path / "run")
    assert [(line["step"], line["loss"] == "nan", line["nonfinite"]) for line in lines] == [
        (step, step == 3, float(step == 3)) for step in range(1, STEPS + 1)
    ]
    assert all(np.isfinite(line["loss"]) for line in lines if line["step"] != 3)


def test_frozen_dtype_in_a_run_leaves_the_parameters_themselves_alone(tmp_path, plain):
    """Checks that frozen parameters take half the bytes, and that the next stage starts from all their bits."""
    config = experiment(tmp_path)
    first = replace(config.stages[0], frozen_dtype="bfloat16", steps=2)
    folder = train(tmp_path, replace(config, stages=(first, config.stages[1])))
    facts = read_json(folder.path / "run.json")["stages"]
    assert facts[0]["frozen_bytes"] * 2 == num_bytes(plain.frozen)
    known = snapshot_meta(folder.snapshot(1, "second"))["frozen"]["fingerprint"]
    encoder = {path: number for path, number in fingerprint(plain.frozen).items() if path.startswith("encoder_image/")}
    assert encoder and encoder.items() <= known.items()
