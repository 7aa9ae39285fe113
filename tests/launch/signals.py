"""Sends signals to launch/local.py just after its start, and counts the processes that outlive it.

    python tests/launch/signals.py --signals 200

It sends SIGTERM, SIGINT, SIGHUP and SIGKILL in turn, at random times, to launchers of two and of eight processes. The
processes of each have their own mark on their command line, by which /proc finds them, even before they run their
command. The exit code is 1 if a process is left, a launcher does not end, or its exit code is not the signal's. A
SIGINT that Python reports to have lost during its own start is counted apart: no line of the launcher has run by then.
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
PATIENCE = 60.0  # seconds, after which a process counts as not ending


def marked(mark: str) -> list[int]:
    """Returns the processes with this word on their command line."""
    found = []
    for folder in Path("/proc").iterdir():
        try:
            if folder.name.isdecimal() and mark in (folder / "cmdline").read_text().split("\0"):
                found.append(int(folder.name))
        except OSError:  # it has just ended
            continue
    return found


def ends(process: int) -> bool:
    """Returns whether a process ends; a launcher's death may have caused it only now."""
    try:
        descriptor = os.pidfd_open(process)
    except ProcessLookupError:
        return True
    try:
        return bool(select.select([descriptor], [], [], PATIENCE)[0])
    finally:
        os.close(descriptor)


def reset_handlers() -> None:
    """Gives a new process the default handlers, even if the tests run under `nohup` or in a script."""
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_DFL)


def lost(launcher: subprocess.Popen, errors: TextIO) -> bool:
    """Returns whether Python reports a SIGINT that it ignored."""
    try:
        launcher.wait(PATIENCE / 20)
    except subprocess.TimeoutExpired:
        return "KeyboardInterrupt" in os.pread(errors.fileno(), 1 << 20, 0).decode()
    return False


def trial(number: signal.Signals, processes: int, instant: float, mark: str) -> Counter:
    """Sends one signal to one launcher; returns what went wrong."""
    command = [sys.executable, str(LOCAL), "-n", str(processes), "--restarts", "2", "--", "sleep", mark]
    errors = tempfile.TemporaryFile("w+")  # noqa: SIM115 (closed with the launcher's end)
    null = subprocess.DEVNULL
    streams = dict(stdin=null, stdout=null, stderr=errors)
    launcher = subprocess.Popen(command, start_new_session=True, preexec_fn=reset_handlers, **streams)
    time.sleep(instant)
    launcher.send_signal(number)
    wrong: Counter = Counter()
    try:
        if number == signal.SIGINT and lost(launcher, errors):
            wrong["lost by Python"] += 1
            number = signal.SIGTERM
            launcher.send_signal(number)
        code = launcher.wait(PATIENCE)
        # By its own handler once it is set, by the system's before that; or SIGINT arrives while Python starts.
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
    # A command that a shell starts with `&`, and its children, ignore SIGINT.
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
