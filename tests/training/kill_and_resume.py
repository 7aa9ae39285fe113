"""Kills a small run with SIGKILL again and again, and counts losses and wrong resumes.

    PYTHONPATH=.:tests/training python tests/training/kill_and_resume.py --kills 200

A third of the kills come at random instants, a third while a checkpoint or a stage's parameters are being written, and
a third at a file operation soon after a checkpoint got its name, when an old one is deleted. The harness knows by
itself, to the last byte, which files must remain (`kill_account.py`). The next start must resume from the newest
checkpoint and write the very bits of a run that was never killed. The exit code is 1 after any fault.

Each start is a fork of this process, which has imported everything and uses no device. So it is killed as a separate
process, and saves the seconds of importing.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import jax
from kill_account import Account, Found, examine, keep_account, read_account

PR_SET_PDEATHSIG = 1  # sys/prctl.h
STEPS, STAGES, EVERY, KEEP = 16, 2, 2, 2
COUNTED = (
    "kills",
    "kills while a checkpoint was written",
    "kills while an old one was deleted",
    "runs ended",
    "lost checkpoints",
    "wrong resumes",
)


def in_child(work: Callable[[], object], output: Path) -> int:
    """Runs `work` in a fork, which prints into a file; returns its process id at once."""
    with warnings.catch_warnings():
        # jax warns about its threads, but it has none before any use of a device, and this process uses none.
        warnings.simplefilter("ignore", RuntimeWarning)
        child = os.fork()
    if child:
        return child
    code = 1
    try:
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)  # it does not outlive the harness
        with open(output, "a") as file:
            os.dup2(file.fileno(), 1)
            os.dup2(file.fileno(), 2)
        work()
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def ended_well(child: int, output: Path) -> None:
    _, status = os.waitpid(child, 0)
    if os.waitstatus_to_exitcode(status) != 0:
        raise SystemExit(f"a process failed by itself:\n{output.read_text()}")


def experiment():
    from dataclasses import replace

    import tiny_config

    from mllm_jax.training.config import CheckpointConfig

    os.environ |= {"TINY_STEPS": str(STEPS), "TINY_STAGES": str(STAGES)}  # not at import: tests import this file too
    return replace(tiny_config.config(), checkpoint=CheckpointConfig(every_steps=EVERY, keep_last=KEEP))


def metrics(folder: Path) -> list[dict]:
    """Returns the complete lines of metrics.jsonl, without their timing."""
    try:
        text = (folder / "metrics.jsonl").read_text()
    except FileNotFoundError:
        return []
    return [{k: v for k, v in json.loads(line).items() if k != "timing"} for line in text.split("\n")[:-1]]


def resumed_at(printed: str) -> int:
    """Returns the step (over all stages) from which the last start resumed, according to its output."""
    step = 0
    for line in printed.splitlines():
        words = line.split()
        if line.startswith("stage stage") and "resumed at step" in line:
            step = int(words[1].strip(":").removeprefix("stage")) * STEPS + int(words[-1])
        elif line.startswith("stage stage"):
            step = int(words[1].strip(":").removeprefix("stage")) * STEPS
    return step


def different(whole: Path, other: Path) -> list[str]:
    """Returns the leaves of all stages' parameters that differ. Call it in a child: reading starts threads."""
    from tiny_runs import arrays

    names = [Path("stages") / f"{stage}-stage{stage}" for stage in range(STAGES)]
    pairs = [(arrays(whole / name), arrays(other / name)) for name in names]
    return [path for left, right in pairs for path in left.keys() | right.keys() if left.get(path) != right.get(path)]


class Harness:
    """A reference run, and runs that are killed until the number of kills is reached."""

    def __init__(self, base: Path, seed: int):
        self.base, self.random = base, random.Random(seed)
        self.counts: Counter = Counter()
        self.faults: list[str] = []
        self.whole = base / "whole"
        began = time.monotonic()
        self.end(self.whole)
        self.seconds = time.monotonic() - began
        began = time.monotonic()  # again, with everything compiled: measures the time of an undisturbed run
        self.end(base / "again")
        self.seconds = time.monotonic() - began
        self.lines = metrics(self.whole)
        self.check_end(base / "again")
        assert not self.faults, self.faults

    def end(self, folder: Path) -> None:
        """Runs a start to its end, without a kill."""
        ended_well(self.start(folder), folder.with_suffix(".out"))

    def start(self, folder: Path, death: tuple[int, int] | None = None) -> int:
        from mllm_jax.training import loop, stage

        def work():
            stage.StageProgram.flops = lambda _: 1  # saves each start a second of tracing
            keep_account(folder, folder.with_suffix(".journal"), death)
            loop.train(experiment(), folder, cache_dir=self.base)

        return in_child(work, folder.with_suffix(".out"))

    def account(self, folder: Path) -> Account:
        return read_account(folder.with_suffix(".journal"))

    def examine(self, folder: Path) -> Found:
        scores = {line["step"]: line["validation_loss"] for line in self.lines if "validation_loss" in line}
        return examine(folder, self.account(folder), STAGES, STEPS, KEEP, scores)

    def fault(self, text: str) -> None:
        self.faults.append(f"after kill {self.counts['kills']}: {text}")
        print(self.faults[-1], flush=True)

    def check_end(self, folder: Path) -> None:
        """Checks that a run that has ended equals the undisturbed one, to the last bit."""
        if metrics(folder) != self.lines:
            self.fault(f"{folder.name}: metrics differ from those of the run that was never killed")
        output = folder.with_suffix(".compared")
        ended_well(in_child(lambda: print(different(self.whole, folder)), output), output)
        if (found := output.read_text().strip()) != "[]":
            self.fault(f"{folder.name}: parameters differ: {found}")

    def check_kept(self, folder: Path) -> Found:
        """Checks the folder of a run after a kill or at its end."""
        found = self.examine(folder)
        for text in found.faults:
            self.counts["lost checkpoints"] += 1
            self.fault(text)
        return found

    def cycle(self, folder: Path) -> bool:
        """Starts the run and kills it; returns True if it ended before the kill."""
        before = self.examine(folder)
        output = folder.with_suffix(".out")
        output.write_text("")  # only this start's output, even if it is killed before it prints
        aim, wait = self.random.choice(("instant", "writing", "operation")), self.random.random()
        child = self.start(folder, (self.random.randrange(4), int(wait * 48)) if aim == "operation" else None)
        code = self.wait_or_kill(child, folder, aim, wait)
        if code not in (0, -signal.SIGKILL):
            raise SystemExit(f"the run failed by itself:\n{output.read_text()}")
        if code == 0:
            self.check_end(folder)
            self.check_kept(folder)
            self.counts["runs ended"] += 1
            return True
        self.counts["kills"] += 1
        found = self.check_kept(folder)
        self.counts["kills while a checkpoint was written"] += self.account(folder).writing is not None
        self.counts["kills while an old one was deleted"] += bool(set(found.going) - set(before.going))
        printed = output.read_text()
        started = "stage stage" in printed
        if started and resumed_at(printed.split("\nstage0  ")[0].split("\nstage1  ")[0]) != before.newest:
            self.counts["wrong resumes"] += 1
            self.fault(f"resumed not at {before.newest}:\n{printed}")
        left = metrics(folder)
        if left != self.lines[: len(left)]:
            self.counts["wrong resumes"] += 1
            self.fault(f"metrics differ after a resume at {before.newest}")
        return False

    def wait_or_kill(self, child: int, folder: Path, aim: str, wait: float) -> int:
        """Kills a start at its time, unless it ends or kills itself; returns its exit code."""
        # The first sign of life of this start; some kills come before it, during imports and restoring.
        loops = aim != "instant" or self.random.random() < 0.7
        began, lines = time.monotonic(), len(metrics(folder))
        seen, until = not loops, began + wait * 2
        while True:
            process, status = os.waitpid(child, os.WNOHANG)
            if process:
                return os.waitstatus_to_exitcode(status)
            now = time.monotonic()
            if not seen and len(metrics(folder)) != lines:
                seen, until = True, now + wait * self.seconds / 3
            if aim == "writing" and seen and self.account(folder).writing is not None:
                time.sleep(wait * 0.03)
                break
            if aim == "instant" and seen and now > until:
                break
            time.sleep(0.002)
        os.kill(child, signal.SIGKILL)
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    import orbax.checkpoint  # noqa: F401 - once, instead of in every child
    import tensorboardX  # noqa: F401

    with tempfile.TemporaryDirectory() as base:
        jax.config.update("jax_platforms", "cpu")
        jax.config.update("jax_compilation_cache_dir", str(Path(base) / "compiled"))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
        jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
        harness = Harness(Path(base), options.seed)
        began, run = time.monotonic(), 0
        while harness.counts["kills"] < options.kills:
            if harness.cycle(Path(base) / f"run{run}"):
                shutil.rmtree(Path(base) / f"run{run}")
                run += 1
            if harness.counts["kills"] % 20 == 0:
                print(dict(harness.counts), f"{time.monotonic() - began:.0f} s", flush=True)
        # The current run ends undisturbed: after the last kills too, it must end with the same bits.
        last = Path(base) / f"run{run}"
        if last.is_dir():
            harness.end(last)
            harness.check_end(last)
            harness.check_kept(last)
            harness.counts["runs ended"] += 1
        print("; ".join(f"{name}: {harness.counts[name]}" for name in COUNTED), f"({time.monotonic() - began:.0f} s)")
        return 1 if harness.faults else 0


if __name__ == "__main__":
    sys.exit(main())
