"""A run opens on other devices and another kind of CPU than those that trained it, and answers the same (row 2).

As a script, this file is the other machine: it opens the given run and prints logits and answers.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import toy_data

HERE = Path(__file__).parent
QUESTIONS = ("what colour", "which number")
MARGIN = 1e-3  # answers are compared where the two best logits differ by more


def experiment():
    from mllm_jax.sharding.mesh import MeshConfig
    from mllm_jax.training.config import AdamW, Experiment, Stage, TokenizerConfig
    from mllm_jax.training.objectives.next_token import NextToken

    stage = Stage("only", NextToken(), ("projector_image/*", "llm/*"), toy_data.IMAGES, 40, AdamW(1e-2, 1))
    return Experiment(
        name="anywhere",
        model=toy_data.MODEL,  # the encoder is drawn and never trained
        tokenizer=TokenizerConfig(vocab_size=320),
        mesh=MeshConfig(data=1, fsdp=4, tensor=2),
        stages=(stage,),
    )


def pose_as_the_packages() -> None:
    """Poses as the package, because a stored config names only classes of the package."""
    sys.modules["mllm_jax.toy_data"] = toy_data
    toy_data.Toy.__module__ = "mllm_jax.toy_data"


def asked(run: Path, devices=None) -> dict:
    """Returns the run's logits of one batch, and its greedy answers."""
    import jax

    from mllm_jax.checkpoints.run import RunFolder
    from mllm_jax.data.message import Message, Text
    from mllm_jax.generation.assistant import Assistant
    from mllm_jax.models.run_weights import load_run

    _, model, params, processor, mesh = load_run(RunFolder(run), devices)
    batch = toy_data.pipeline().batch(0)
    logits = jax.jit(lambda p, b: model.apply({"params": p}, b).logits)(params, batch)
    (image,) = toy_data.Toy().build().example(3).media
    assistant = Assistant(model, params, processor, mesh=mesh)
    answers = assistant.generate([[Message("user", (image, Text(q)))] for q in QUESTIONS], max_new_tokens=4)
    said = [answer.text for answer in answers]
    return {"logits": np.asarray(logits)[:2].tolist(), "answers": said, "mesh": dict(mesh.shape)}


def test_a_run_of_eight_devices_opens_on_one_of_an_older_cpu(tmp_path, devices):
    from mllm_jax.training.loop import train

    before = toy_data.Toy.__module__
    pose_as_the_packages()
    try:
        train(experiment(), tmp_path / "run")
        here = asked(tmp_path / "run")
        one = asked(tmp_path / "run", devices[:1])
    finally:
        toy_data.Toy.__module__ = before
    paths = [*map(str, (HERE.parents[1], HERE)), os.environ.get("PYTHONPATH", "")]
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join(filter(None, paths)),
        "XLA_FLAGS": "--xla_cpu_max_isa=SSE4_2 --xla_force_host_platform_device_count=1",
    }
    command = [sys.executable, __file__, str(tmp_path / "run")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    there = json.loads(done.stdout.splitlines()[-1])
    assert (here["mesh"]["fsdp"], here["mesh"]["tensor"]) == (4, 2)
    assert there["mesh"] == one["mesh"] == {"data": 1, "fsdp": 1, "context": 1, "tensor": 1}
    logits = np.asarray(here["logits"])
    best = np.sort(logits, axis=-1)
    clear = best[..., -1] - best[..., -2] > MARGIN
    assert clear.mean() > 0.9, "a model without opinions would prove nothing"
    for other in (one, there):
        np.testing.assert_allclose(other["logits"], logits, atol=1e-4)
        assert (np.argmax(other["logits"], -1) == logits.argmax(-1))[clear].all()
        assert other["answers"] == here["answers"] and any(here["answers"])


if __name__ == "__main__":
    pose_as_the_packages()
    print(json.dumps(asked(Path(sys.argv[1]))))
