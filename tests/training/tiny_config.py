"""A run of a few seconds, for tests that start it in several processes; environment variables change it.

TINY_MESH: sizes of the mesh axes as JSON. TINY_PAUSE: seconds before each step. TINY_RECORD: a file for a hash of each
batch. TINY_EVALUATE: evaluates at the end, and at this interval of steps. TINY_STEPS: number of steps of a stage.
TINY_STAGES: number of stages.
TINY_HOLD: number of steps after which each process waits for a test: until the file TINY_GATE exists, or, without one,
until all processes have received a notice to stop. Each process makes a file TINY_GATE.<its index>.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from pathlib import Path

import toy_data
from toy_evaluation import colours

from mllm_jax.data.pipeline import Mixture, Weighted
from mllm_jax.sharding.mesh import MeshConfig
from mllm_jax.training.config import AdamW, CheckpointConfig, Experiment, Stage, TokenizerConfig
from mllm_jax.training.objectives.next_token import NextToken

STEPS = 8
COLOURS = colours("toy/colour", toy_data.Toy(), max_new_tokens=4)
MIXTURE = Mixture((Weighted(toy_data.Toy()),), rows=8, length=32, slots={"image": 1})


def config() -> Experiment:
    watch_steps(os.environ.get("TINY_RECORD"), float(os.environ.get("TINY_PAUSE", "0")))
    mesh = MeshConfig(**json.loads(os.environ.get("TINY_MESH", "{}")))
    return Experiment(
        name="tiny",
        model=toy_data.MODEL,
        tokenizer=TokenizerConfig(vocab_size=320),
        mesh=mesh,
        log_every=1,
        checkpoint=CheckpointConfig(every_steps=3),
        evaluation=(COLOURS,) if os.environ.get("TINY_EVALUATE") else (),
        stages=tuple(stage(f"stage{number}") for number in range(int(os.environ.get("TINY_STAGES", "1")))),
    )


def stage(name: str) -> Stage:
    return Stage(
        name=name,
        objective=NextToken(),
        trainable=("projector_image/*", "llm/*"),
        data=MIXTURE,
        optimizer=AdamW(learning_rate=1e-2, warmup_steps=2),
        steps=int(os.environ.get("TINY_STEPS", STEPS)),
        validation=MIXTURE,
        validate_every=4,
        validation_batches=1,
        evaluate_every=int(os.environ["TINY_EVALUATE"]) if os.environ.get("TINY_EVALUATE") else None,
    )


def wait_at(gate: str | None) -> None:
    import jax
    from jax._src.distributed import global_state

    if gate is not None:
        Path(f"{gate}.{jax.process_index()}").touch()
        while not Path(gate).exists():
            assert Path(gate).parent.is_dir(), "the test is over"
            time.sleep(0.01)
    else:
        # Here jax records the progress of each process that has received the notice.
        while len(global_state.client.key_value_dir_get("PREEMPTION_CURRENT_COUNTER/")) < jax.process_count():
            time.sleep(0.01)


def watch_steps(record: str | None, pause: float) -> None:
    """Lets every step wait a little, and records a hash of this process's part of the batch."""
    import jax
    import numpy as np

    from mllm_jax.training import stage

    make, hold = stage.make_train_step, int(os.environ.get("TINY_HOLD", "-1"))

    def make_watched(*args, **kwargs):
        step_fn = make(*args, **kwargs)

        def watched(state, frozen, batch):
            time.sleep(pause)
            step = int(state.step)
            if step == hold:
                wait_at(os.environ.get("TINY_GATE"))
            if record is not None:
                note(step, batch)
            return step_fn(state, frozen, batch)

        return watched

    def note(step, batch):
        rows = {}
        for shard in batch["tokens"].addressable_shards:
            first = shard.index[0].start or 0
            for i, row in enumerate(np.asarray(shard.data)):
                rows[first + i] = hashlib.sha256(row.tobytes()).hexdigest()[:16]
        with Path(f"{record}.{jax.process_index()}").open("a") as file:
            file.write(json.dumps({"step": step, "rows": rows}) + "\n")

    if getattr(make, "__name__", "") != "make_watched":
        stage.make_train_step = make_watched
