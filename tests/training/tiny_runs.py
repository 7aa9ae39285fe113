"""Tiny runs in separate processes, for tests that kill them; as a script, this file is such a process."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
STEPS = 8  # of each stage of configs/smoke.py


@dataclass(frozen=True)
class Setting:
    """Number of devices, mesh, and `cache`: JAX's compilation cache, which the starts of a run share."""

    devices: int
    mesh: dict[str, int]
    cache: Path

    def environment(self) -> dict[str, str]:
        count = "--xla_force_host_platform_device_count"
        others = [flag for flag in os.environ.get("XLA_FLAGS", "").split() if not flag.startswith(count)]
        return os.environ | {
            "PYTHONPATH": os.pathsep.join(filter(None, [*map(str, (ROOT, HERE)), os.environ.get("PYTHONPATH")])),
            "XLA_FLAGS": " ".join([f"{count}={self.devices}", *others]),
            "JAX_COMPILATION_CACHE_DIR": str(self.cache),
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
            "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
        }


def experiment(mesh: dict[str, int]):
    """Returns the experiment of configs/smoke.py on a mesh, without its evaluation."""
    from mllm_jax.sharding.mesh import MeshConfig
    from mllm_jax.training.config_file import load_config

    smoke = load_config(ROOT / "configs" / "smoke.py")
    assert all(stage.steps == STEPS for stage in smoke.stages) and smoke.log_every == 1
    assert smoke.checkpoint.every_steps == 3
    return replace(smoke, evaluation=(), mesh=MeshConfig(**mesh))


def watch_steps(
    record: Path | None, pause: float, hold: tuple[str, int] | None = None, gate: str | None = None
) -> None:
    """Lets every training step wait a little, and records a hash of its batch.

    Args:
        hold: a stage, and the number of its steps after which the run waits.
        gate: the file that it waits for; None: waits for its end.
    """
    import jax
    import numpy as np

    from mllm_jax.training import loop, stage

    make, now, test = stage.make_train_step, {}, os.getppid()

    class Watched(loop.StageRunner):
        def run(self, *args, **kwargs):
            now["name"] = self.stage.name
            return super().run(*args, **kwargs)

    def make_watched(*args, **kwargs):
        step_fn = make(*args, **kwargs)

        def watched(state, frozen, batch):
            if record is not None:
                digest = hashlib.sha256()
                for name in sorted(batch):
                    digest.update(name.encode() + np.ascontiguousarray(jax.device_get(batch[name])).tobytes())
                line = {"stage": now["name"], "step": int(state.step), "hash": digest.hexdigest()}
                with record.open("a") as file:
                    file.write(json.dumps(line) + "\n")
            time.sleep(pause)
            # A test that has died cannot kill this process.
            while hold and hold == (now["name"], int(state.step)) and os.getppid() == test:
                if gate and Path(gate).exists():
                    break
                time.sleep(0.005)
            return step_fn(state, frozen, batch)

        return watched

    loop.StageRunner, stage.make_train_step = Watched, make_watched


@dataclass
class Started:
    """A training process; its output goes to a file."""

    process: subprocess.Popen
    folder: Path
    output: Path

    def wait_for(self, reached: Callable[[list[dict]], bool], seconds: float = 900) -> None:
        """Returns as soon as the metrics written so far satisfy `reached`."""
        until = time.monotonic() + seconds
        while not reached(metrics(self.folder)):
            assert self.process.poll() is None, f"the run ended too early:\n{self.output.read_text()}"
            assert time.monotonic() < until, f"not reached in {seconds} s:\n{self.output.read_text()}"
            time.sleep(0.005)

    def end(self, expected: int, seconds: float = 900) -> str:
        """Waits for the end; returns the output of the run."""
        try:
            code = self.process.wait(seconds)
        finally:
            self.process.kill()
        printed = self.output.read_text()
        assert code == expected, f"exit code {code} instead of {expected}:\n{printed}"
        return printed


def start(
    setting: Setting, folder: Path, *, fresh=False, pause=0.0, record: Path | None = None, hold: tuple | None = None
) -> Started:
    """Trains into `folder` in a new process; `hold`: (stage, steps) at which it waits for the kill."""
    arguments = {"folder": str(folder), "mesh": setting.mesh, "fresh": fresh, "pause": pause, "hold": hold}
    arguments |= {"record": record and str(record), "lengths": str(setting.cache.parent / "lengths")}
    return start_command([str(Path(__file__)), json.dumps(arguments)], setting, folder)


def start_command(arguments: list[str], setting: Setting, folder: Path) -> Started:
    output = folder.with_name(f"{folder.name}.out")
    with output.open("w") as file:
        process = subprocess.Popen(
            [sys.executable, *arguments], cwd=ROOT, env=setting.environment(), stdout=file, stderr=subprocess.STDOUT
        )
    return Started(process, folder, output)


# ---- the files of a run


def metrics(folder: Path) -> list[dict]:
    """Returns the complete lines of metrics.jsonl, without their timing."""
    try:
        text = (folder / "metrics.jsonl").read_text()
    except FileNotFoundError:
        return []
    lines = [json.loads(line) for line in text.split("\n")[:-1]]
    return [{name: value for name, value in line.items() if name != "timing"} for line in lines]


def arrays(folder: Path) -> dict[str, tuple]:
    """Reads every leaf of a checkpoint or snapshot folder: path -> (dtype, shape, bytes)."""
    import numpy as np
    import orbax.checkpoint as ocp

    paths = [p for p, (shape, _) in _leaves(folder).items() if 0 not in shape]
    request = ocp.args.PyTreeRestore(
        item=dict.fromkeys(paths, 0), restore_args={p: ocp.RestoreArgs(restore_type=np.ndarray) for p in paths}
    )
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as reader:
        found = reader.restore(folder / "arrays", args=request)
    return {path: (str(x.dtype), x.shape, x.tobytes()) for path, x in found.items()}


def _leaves(folder: Path) -> dict:
    return json.loads((folder / "record.json").read_text())["leaves"]


def hashes(record: Path) -> dict[tuple[str, int], str]:
    lines = [json.loads(line) for line in record.read_text().splitlines()]
    return {(line["stage"], line["step"]): line["hash"] for line in lines}


def main() -> None:
    from mllm_jax.training.loop import train

    given = json.loads(sys.argv[1])
    record = given["record"] and Path(given["record"])
    watch_steps(record, given["pause"], given["hold"] and tuple(given["hold"]))
    train(experiment(given["mesh"]), Path(given["folder"]), fresh=given["fresh"], cache_dir=Path(given["lengths"]))


if __name__ == "__main__":
    main()
