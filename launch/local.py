#!/usr/bin/env python3
"""Several processes on this machine as if each were a host: what runs on a pod, tried on a laptop's CPU.

    python launch/local.py --processes 2 --devices 4 -- mllm train configs/smoke.py --run-dir runs/two

Each line of output begins with the number of its process. When one of them fails, the others are given a little time
to notice by themselves and are then ended; with `--restarts` all begin again and go on from the last checkpoint.
"""

from __future__ import annotations

import argparse
import os
import signal
import socket
import subprocess
import sys
import threading
import time

DEVICE_COUNT = "--xla_force_host_platform_device_count"
STOPPED = 130  # the run was asked to stop and has saved: no failure


def main(arguments: list[str] | None = None) -> int:
    """Returns the exit code of the first process that did not end well, else 0."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--processes", "-n", type=int, default=2, help="how many (default: 2)")
    parser.add_argument("--devices", type=int, default=1, help="CPU devices of each process (default: 1)")
    parser.add_argument("--restarts", type=int, default=0, help="starts after a failure (default: 0)")
    parser.add_argument("--grace", type=float, default=30.0, help="seconds between a failure and the end of the rest")
    parser.add_argument("--port", type=int, default=0, help="of the coordinator (default: a free one)")
    parser.add_argument("--dry-run", action="store_true", help="print the commands and start nothing")
    parser.add_argument("command", nargs=argparse.REMAINDER, help="-- and the command, such as: mllm train CONFIG")
    options = parser.parse_args(arguments)
    command = options.command[1:] if options.command[:1] == ["--"] else options.command
    if not command or options.processes < 1 or options.devices < 1:
        parser.error("give at least one process with one device, and a command after --")
    if options.dry_run:
        for process in range(options.processes):
            extra = settings(process, options.processes, options.devices, options.port or 12345)
            print(" ".join([*(f"{name}={value!r}" for name, value in extra.items()), *command]))
        return 0
    for start in range(options.restarts + 1):
        code = run(command, options)
        if code in (0, STOPPED) or start == options.restarts:
            return code
        print(f"local: exit code {code}; restart {start + 1} of {options.restarts}", file=sys.stderr, flush=True)
    raise AssertionError("the last start returns")


def settings(process: int, count: int, devices: int, port: int) -> dict[str, str]:
    """What the environment of one process has more than this one's."""
    others = [flag for flag in os.environ.get("XLA_FLAGS", "").split() if not flag.startswith(DEVICE_COUNT)]
    return {
        "JAX_PLATFORMS": "cpu",
        "JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{port}",
        "JAX_NUM_PROCESSES": str(count),
        "JAX_PROCESS_ID": str(process),
        "XLA_FLAGS": " ".join([f"{DEVICE_COUNT}={devices}", *others]),
        # XLA's pool has a thread a core; a device that waits in a collective holds one.
        "NPROC": str(max(os.cpu_count() or 1, 4 * devices)),
    }


def run(command: list[str], options: argparse.Namespace) -> int:
    """One start of all processes; Ctrl-C and SIGTERM are passed on to them."""
    port = options.port or free_port()
    processes = [
        subprocess.Popen(
            command,
            env=os.environ | settings(number, options.processes, options.devices, port),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # a Ctrl-C in the terminal reaches them through this process alone
        )
        for number in range(options.processes)
    ]
    threads = [threading.Thread(target=relay, args=pair) for pair in enumerate(processes)]
    for thread in threads:
        thread.start()

    def forward(number, frame):
        for process in processes:
            if process.poll() is None:
                process.send_signal(number)

    before = {number: signal.signal(number, forward) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        first, since = 0, None
        while None in (codes := [process.poll() for process in processes]):
            failed = [code for code in codes if code not in (None, 0, STOPPED)]
            if failed and since is None:
                first, since = failed[0], time.monotonic()
            if since is not None and time.monotonic() - since > options.grace:
                for process in processes:
                    if process.poll() is None:
                        process.kill()
            time.sleep(0.05)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        for process in processes:
            if process.poll() is None:
                process.kill()
        for thread in threads:
            thread.join()
    codes = [process.returncode for process in processes]
    return first or next((code for code in codes if code), 0)


def relay(number: int, process: subprocess.Popen) -> None:
    for line in process.stdout:
        sys.stdout.buffer.write(f"[{number}] ".encode() + line)
        sys.stdout.buffer.flush()


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


if __name__ == "__main__":
    sys.exit(main())
