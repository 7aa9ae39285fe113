"""Sends signals to launch/local.py in the first moments of its life, and counts the processes that outlive it.

    python tests/launch/signals.py --signals 200

SIGTERM, SIGINT, SIGHUP and SIGKILL in turn, at random instants, to launchers of two and of eight processes. The
processes of each have a mark of their own on their command line, by which /proc finds them, also before they become
what they were started for. Exit code 1 if one is left, a launcher does not end, or its exit code is not the signal's. A
SIGINT that Python itself loses while it starts, and says so, is counted apart: no line of the launcher has run by then.
"""

from __future__ import annotations

import argparse
import os
import random
import select
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import TextIO

LOCAL = Path(__file__).parents[2] / "launch" / "local.py"
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGKILL)
FIRST_SECONDS = 0.4
PATIENCE = 60.0  # to be sure that something does not end


def marked(mark: str) -> list[int]:
    """The processes with this word on their command line."""
    found = []
    for folder in Path("/proc").iterdir():
        try:
            if folder.name.isdecimal() and mark in (folder / "cmdline").read_text().split("\0"):
                found.append(int(folder.name))
        except OSError:  # it has just ended
            continue
    return found


def ends(process: int) -> bool:
    """Whether it ends, which a launcher's death may have brought about only just now."""
    try:
        descriptor = os.pidfd_open(process)
    except ProcessLookupError:
        return True
    try:
        return bool(select.select([descriptor], [], [], PATIENCE)[0])
    finally:
        os.close(descriptor)


def heed_all() -> None:
    """Gives a new process the handlers that a terminal's has, also where the tests run under `nohup` or in a script."""
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_DFL)


def lost(launcher: subprocess.Popen, errors: TextIO) -> bool:
    """Whether Python says that it met a SIGINT, and goes on."""
    try:
        launcher.wait(PATIENCE / 20)
    except subprocess.TimeoutExpired:
        return "KeyboardInterrupt" in os.pread(errors.fileno(), 1 << 20, 0).decode()
    return False


def trial(number: signal.Signals, processes: int, instant: float, mark: str) -> Counter:
    """One launcher, one signal: what went wrong."""
    command = [sys.executable, str(LOCAL), "-n", str(processes), "--restarts", "2", "--", "sleep", mark]
    errors = tempfile.TemporaryFile("w+")  # noqa: SIM115 (closed with the launcher's end)
    null = subprocess.DEVNULL
    streams = dict(stdin=null, stdout=null, stderr=errors)
    launcher = subprocess.Popen(command, start_new_session=True, preexec_fn=heed_all, **streams)
    time.sleep(instant)
    launcher.send_signal(number)
    wrong: Counter = Counter()
    try:
        if number == signal.SIGINT and lost(launcher, errors):
            wrong["lost by Python"] += 1
            number = signal.SIGTERM
            launcher.send_signal(number)
        code = launcher.wait(PATIENCE)
        # By its own handler once it is set, by the system's before that; or SIGINT meets Python while it starts.
        if code not in (128 + number, -number) and (number, code) != (signal.SIGINT, 1):
            print(f"{number.name} after {instant:.3f} s: exit code {code}", flush=True)
            wrong["wrong codes"] += 1
    except subprocess.TimeoutExpired:
        wrong["not ended"] += 1
        launcher.kill()
        launcher.wait()
    errors.close()
    for process in marked(mark):
        if not ends(process):
            wrong["orphans"] += 1
            os.kill(process, signal.SIGKILL)
    return wrong


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--signals", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    # What a shell starts with `&` has SIGINT ignored, and what that starts as well.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    rng = random.Random(options.seed)
    began, wrong = time.monotonic(), Counter()
    for i in range(options.signals):
        mark = f"{3600 + i}.{os.getpid()}"  # seconds, to `sleep`
        wrong += trial(SIGNALS[i % 4], (2, 8)[i // 4 % 2], rng.uniform(0, FIRST_SECONDS), mark)
    parts = [f"signals {options.signals}", f"seed {options.seed}"]
    parts += [f"{name} {wrong[name]}" for name in ("orphans", "not ended", "wrong codes", "lost by Python")]
    print(" | ".join([*parts, f"{time.monotonic() - began:.0f} s"]))
    return int(wrong.total() > wrong["lost by Python"])


if __name__ == "__main__":
    sys.exit(main())
