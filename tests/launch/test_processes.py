"""One run in one, two and four processes: the same numbers; killed, preempted, resumed on other hosts and devices."""

from __future__ import annotations

import json
import os
import random
import re
import select
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import pytest
from tiny_runs import arrays, metrics

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
CONFIG = ROOT / "tests" / "training" / "tiny_config.py"
STEPS = 8
FOUR = {"data": 2, "fsdp": 2}


@dataclass
class Started:
    """Processes under launch/local.py; their output goes to a file."""

    launcher: subprocess.Popen
    folder: Path
    output: Path

    def processes(self) -> list[int]:
        """Returns their process ids, in order."""
        return [int(pid) for pid in Path(f"/proc/{self.launcher.pid}/task").glob("*/children") for pid in _words(pid)]

    def wait_for(self, step: int, checkpoint: int | None = None, seconds: float = 600) -> None:
        """Returns after a step is done and a checkpoint is complete."""
        sealed = self.folder / "checkpoints" / "0-stage0" / f"{checkpoint or 0:08d}" / "manifest.json"
        until = time.monotonic() + seconds
        while not any(line["step"] >= step and "loss" in line for line in metrics(self.folder)) or (
            checkpoint is not None and not sealed.is_file()
        ):
            assert self.launcher.poll() is None, f"ended too early:\n{self.output.read_text()}"
            assert time.monotonic() < until, self.output.read_text()
            time.sleep(0.01)

    def wait_until_held(self, gate: Path, seconds: float = 600) -> None:
        """Returns after each process of the run waits at the gate."""
        until = time.monotonic() + seconds
        while len(list(gate.parent.glob(f"{gate.name}.*"))) < len(self.processes()) or not self.processes():
            assert self.launcher.poll() is None, f"ended too early:\n{self.output.read_text()}"
            assert time.monotonic() < until, self.output.read_text()
            time.sleep(0.01)

    def kill(self, number: int) -> None:
        """Kills one of the processes; returns after it is dead."""
        process = self.processes()[number]
        descriptor = os.pidfd_open(process)
        os.kill(process, signal.SIGKILL)
        assert select.select([descriptor], [], [], 60)[0]
        os.close(descriptor)

    def end(self, *expected: int, seconds: float = 600) -> str:
        try:
            code = self.launcher.wait(seconds)
        finally:
            self.launcher.terminate()
        printed = self.output.read_text()
        assert code in expected, f"exit code {code} instead of {expected}:\n{printed}"
        assert "[Gloo]" not in printed and "preemption_notifier" not in printed
        return printed


def _words(children: Path) -> list[str]:
    return children.read_text().split()


class Place:
    """The folder of this file's runs, with a cache of compiled programs for runs of the same shape."""

    def __init__(self, base: Path):
        self.base = base

    def start(self, name: str, processes: int, devices: int, mesh: dict, *, pause=0.0, restarts=0, extra=(), **tiny):
        # jax, imported here, has set the level of C++'s log; a launcher's shell has not.
        inherited = {name: value for name, value in os.environ.items() if name != "TF_CPP_MIN_LOG_LEVEL"}
        environment = inherited | {
            "PYTHONPATH": f"{ROOT}{os.pathsep}{CONFIG.parent}",
            "TINY_MESH": json.dumps(mesh),
            "TINY_PAUSE": str(pause),
            "TINY_RECORD": str(self.base / f"{name}.batches"),
            "JAX_COMPILATION_CACHE_DIR": str(self.base / "compiled"),
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
            "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
        }
        command = [sys.executable, "launch/local.py", "-n", str(processes), "--devices", str(devices)]
        command += ["--restarts", str(restarts), "--grace", "1" if restarts else "90", "--"]
        command += [
            sys.executable,
            "-m",
            "mllm_jax.cli",
            "train",
            str(CONFIG),
            "--run-dir",
            str(self.base / name),
            *extra,
        ]
        output = self.base / f"{name}.out"
        with output.open("a") as file:
            environment |= {f"TINY_{key.upper()}": value for key, value in tiny.items()}
            launcher = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=file, stderr=subprocess.STDOUT)
        return Started(launcher, self.base / name, output)

    def batches(self, name: str) -> dict[int, dict[str, str]]:
        """Returns step -> row -> hash of all processes; checks that a repeated step had the same rows."""
        found: dict[int, dict[str, str]] = {}
        for file in self.base.glob(f"{name}.batches.*"):
            for line in map(json.loads, file.read_text().splitlines()):
                rows = found.setdefault(line["step"], {})
                assert all(rows.get(row, digest) == digest for row, digest in line["rows"].items())
                rows |= line["rows"]
        return found


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Place:
    return Place(tmp_path_factory.mktemp("processes"))


@pytest.fixture(scope="module")
def one(place) -> Path:
    started = place.start("one", 1, 4, FOUR, evaluate="4", extra=("--profile",))
    assert "profile of steps 2 to 4: open" in started.end(0)
    return started.folder


@pytest.fixture(scope="module")
def several(place, one) -> dict[int, Path]:
    """Returns the run in two and in four processes without interruptions."""
    found = {}
    for processes in (2, 4):
        started = place.start(
            str(processes), processes, 4 // processes, FOUR, **({"evaluate": "4"} if processes == 2 else {})
        )
        started.end(0)
        found[processes] = started.folder
    return found


def snapshot(folder: Path) -> dict:
    return arrays(folder / "stages" / "0-stage0")


def evaluations(folder: Path) -> list[dict]:
    """Returns the lines of metrics.jsonl that tasks gave while the run trained."""
    return [line for line in metrics(folder) if any(name.startswith("evaluation/") for name in line)]


def training(folder: Path) -> list[dict]:
    """Returns the other lines."""
    return [line for line in metrics(folder) if line not in evaluations(folder)]


def assert_close(folder: Path, expected: Path, tolerance: float) -> None:
    lines, wanted = training(folder), training(expected)
    assert [sorted(line) for line in lines] == [sorted(line) for line in wanted]
    for line, other in zip(lines, wanted, strict=True):
        for name in {"loss", "validation_loss"} & line.keys():
            assert line[name] == pytest.approx(other[name], rel=tolerance), (line["step"], name)


@pytest.mark.parametrize("processes", [2, 4])
def test_several_processes_equal_one(place, one, several, processes):
    assert_close(several[processes], one, 1e-5)
    assert place.batches(str(processes)) == place.batches("one")
    rows = [len(json.loads(line)["rows"]) for line in (place.base / f"{processes}.batches.1").read_text().splitlines()]
    assert rows == [8 // processes] * STEPS, "each process holds its own rows and no others"


def test_one_process_writes_the_run_and_the_evaluation_of_all(one, several):
    folder = several[2]
    for name in ("results.json", "examples.json", "predictions.jsonl"):
        assert (folder / name).read_text() == (one / name).read_text()
    assert [line["step"] for line in evaluations(folder)] == [4, 8] and evaluations(folder) == evaluations(one)
    assert "Where the time went" in (folder / "report.html").read_text()
    assert [len(list((run / "tensorboard").iterdir())) for run in (one, folder)] == [1, 1]
    assert json.loads((folder / "goodput.json").read_text())["finished"] is True


@pytest.mark.parametrize("processes", [2, 4])
def test_one_is_killed_and_all_go_on_to_the_same_bits(place, several, processes):
    rng = random.Random(processes)
    name = f"{processes}-killed"
    gate = place.base / f"{name}.gate"  # before the last step: the kill comes at any time before that, never later
    started = place.start(name, processes, 4 // processes, FOUR, pause=0.3, restarts=1, hold="7", gate=str(gate))
    started.wait_for(rng.randint(3, 5), checkpoint=3)
    started.kill(rng.randrange(processes))
    gate.touch()
    printed = started.end(0)
    assert "restart 1 of 1" in printed and re.search(r"\[0\] stage stage0: resumed at step [36]", printed)
    assert metrics(started.folder) == training(several[processes])
    assert snapshot(started.folder) == snapshot(several[processes])
    assert place.batches(name) == place.batches(str(processes))
    seconds = json.loads((started.folder / "goodput.json").read_text())["seconds"]
    assert seconds["down"] > 0 and seconds["productive"] > 0


def test_eight_devices_preempted_then_four_with_a_host_that_dies_then_two(place, one):
    # A notice to one of two processes: both save the same step. jax checks for notices once a second, and then they
    # agree on a future step: so that there is one, both wait before the fifth step until both have the notice.
    started = place.start("elastic", 2, 4, {"data": 2, "fsdp": 4}, hold="4")
    started.wait_for(2)
    os.kill(started.processes()[1], signal.SIGTERM)
    printed = started.end(130)
    stopped = set(re.findall(r"stopped at step (\d) of stage", printed))
    assert len(stopped) == 1 and len(re.findall("stopped at step", printed)) == 2, printed
    (at,) = stopped
    # Four processes; one dies, and the launcher does not end the others: they report it and exit. They may notice its
    # death and exit before it has ended, so they wait until it is dead.
    gate = place.base / "elastic.gate"
    more = {"hold": str(int(at) + 1), "gate": str(gate)}
    started = place.start("elastic", 4, 1, FOUR, extra=("--hosts.heartbeat-seconds", "10"), **more)
    started.wait_until_held(gate)
    started.kill(2)
    gate.touch()
    printed = started.end(128 + signal.SIGKILL)
    assert f"resumed at step {at}" in printed
    assert "another task died" in printed or "lost another one" in printed
    # One process with two devices ends it.
    started = place.start("elastic", 1, 2, {"data": 2})
    started.end(0)
    assert_close(started.folder, one, 1e-4)
    assert place.batches("elastic") == place.batches("one")
