#!/usr/bin/env python3
"""Starts several processes on this machine as if each were a host, to try a pod's run on a laptop's CPU.

    python launch/local.py --processes 2 --devices 4 -- mllm train configs/smoke.py --run-dir runs/two

Each line of output begins with the number of its process. If one process fails, the others have a short time to notice
and are then ended; with `--restarts` all start again from the last checkpoint.

SIGTERM, SIGINT and SIGHUP are passed on to all processes and their children. A requested stop is no failure: nothing
starts again, and the exit code is that of the signal (143, 130, 129). A second SIGTERM or SIGINT ends everything within
seconds. SIGHUP stays ignored if it was (`nohup`).

On Linux the processes also end when this one is killed; their children do not. On other systems they keep running, and
if processes fail within 50 ms of each other, the one with the lowest number counts as the first.
"""

# ruff: noqa: E402
from __future__ import annotations

import signal

if __name__ == "__main__":  # an import may lose a KeyboardInterrupt; this exits at once, with nothing started
    signal.signal(signal.SIGINT, signal.SIG_DFL)

import argparse
import ctypes
import errno
import os
import random
import selectors
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress

DEVICE_COUNT = "--xla_force_host_platform_device_count"
STOPPED = 130  # the run stopped on request and has saved: no failure
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
LAST_SECONDS = 5.0  # from a second signal to the end of everything
PR_SET_PDEATHSIG = 1  # linux/prctl.h
LONGEST_LINE = 1 << 20
POLL_SECONDS = 0.05  # on systems that do not report the end of a process


def main(arguments: list[str] | None = None) -> int:
    """Returns the exit code of the process that failed first (128 plus the signal that stopped it), or 0.

    The code is 130 if the processes agreed to stop, and 126 or 127 if the command cannot be started.
    """
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--processes", "-n", type=int, default=2, help="number of processes (default: 2)")
    parser.add_argument("--devices", type=int, default=1, help="CPU devices of each process (default: 1)")
    parser.add_argument("--restarts", type=int, default=0, help="restarts after a failure (default: 0)")
    parser.add_argument("--grace", type=float, default=30.0, help="seconds between a failure and the end of the rest")
    parser.add_argument("--port", type=int, default=0, help="port of the coordinator (default: a free one)")
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
    with Group() as group:
        for start in range(options.restarts + 1):
            if group.signalled is not None:
                break
            try:
                code = run(group, command, options)
            except OSError as error:
                reason = "no such command" if isinstance(error, FileNotFoundError) else error.strerror
                say(f"{command[0]} cannot be started: {reason}")
                return 127 if isinstance(error, FileNotFoundError) else 126
            if code in (0, STOPPED) or group.signalled is not None or start == options.restarts:
                return code
            say(f"exit code {code}; restart {start + 1} of {options.restarts}")
    return 128 + group.signalled


def settings(process: int, count: int, devices: int, port: int) -> dict[str, str]:
    """Returns the environment variables of one process that differ from this one's."""
    others = [flag for flag in os.environ.get("XLA_FLAGS", "").split() if not flag.startswith(DEVICE_COUNT)]
    return {
        "JAX_PLATFORMS": "cpu",
        "JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{port}",
        "JAX_NUM_PROCESSES": str(count),
        "JAX_PROCESS_ID": str(process),
        "XLA_FLAGS": " ".join([f"{DEVICE_COUNT}={devices}", *others]),
        # XLA's pool has one thread per core; a device that waits in a collective occupies one.
        "NPROC": str(max(os.cpu_count() or 1, 4 * devices)),
        # Only errors of C++, which otherwise warns about each SIGTERM. It reads this when jax is imported, never later.
        "TF_CPP_MIN_LOG_LEVEL": os.environ.get("TF_CPP_MIN_LOG_LEVEL", "2"),
    }


class Group:
    """The processes of a start, and the signals sent to them; this program has no threads.

    Each process leads a session: a Ctrl-C in the terminal reaches it only through this program, and its children can be
    ended with it. None is reaped before the end, so its number cannot become that of another process.
    """

    def __init__(self) -> None:
        self.processes: list[subprocess.Popen] = []
        self.signalled: int | None = None  # the first signal that requested a stop
        # Python runs a handler between two of its steps: a signal just before a wait must end that wait.
        self.woken, self._waker = socket.socketpair()
        self._parent = os.getpid()
        self._prctl = ctypes.CDLL(None).prctl if sys.platform == "linux" else None

    def __enter__(self) -> Group:
        # Under `nohup` SIGHUP stays ignored. A script's shell makes commands started with `&` ignore SIGINT, since a
        # Ctrl-C is not meant for them; a SIGINT that is sent to this process is handled.
        handled = [x for x in SIGNALS if x != signal.SIGHUP or signal.getsignal(x) is not signal.SIG_IGN]
        for side in (self.woken, self._waker):
            side.setblocking(False)
        self._waker_before = signal.set_wakeup_fd(self._waker.fileno(), warn_on_full_buffer=False)
        self._before = {number: signal.signal(number, self._forward) for number in handled}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler or signal.SIG_DFL)
        signal.set_wakeup_fd(self._waker_before)
        self.woken.close()
        self._waker.close()

    def start(self, command: list[str], environments: list[dict[str, str]], watch: Callable) -> None:
        """Starts and watches a process for each environment; starts none after a request to stop.

        A signal waits until all have started.

        Raises:
            OSError: the command cannot be started, though some processes may have.
        """
        mask = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
        try:
            for environment in environments if self.signalled is None else []:
                process = subprocess.Popen(
                    command,
                    env=environment,
                    stdout=subprocess.PIPE,
                    stderr=subprocess.STDOUT,
                    bufsize=0,
                    start_new_session=True,
                    preexec_fn=lambda: self._become_child(mask),  # safe: there are no threads
                )
                self.processes.append(process)
                watch(process)
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, mask)

    def _become_child(self, mask: set[int]) -> None:
        """Restores this program's original handlers and mask in a new process, and makes it end with this one."""
        for number in self._before:
            signal.signal(number, signal.SIG_DFL)
        if self._prctl is not None:
            self._prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
            if os.getppid() != self._parent:  # the parent died before that call
                os._exit(1)
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)

    def _forward(self, number: int, frame: object) -> None:
        first = self.signalled is None
        self.signalled = number if first else self.signalled
        self.send(number)
        # A terminal that closes may send several SIGHUPs: they are one request.
        if not first and number != signal.SIGHUP:
            signal.signal(signal.SIGALRM, self._end)
            signal.setitimer(signal.ITIMER_REAL, LAST_SECONDS, 1.0)

    def _end(self, number: int, frame: object) -> None:
        """Ends everything at once, even if a line of output waits for its reader."""
        self.kill()
        os._exit(128 + self.signalled)

    def send(self, number: int) -> None:
        """Sends a signal to all processes and their children."""
        for process in self.processes:
            with suppress(OSError):  # it belongs to another user, or has ended
                os.killpg(process.pid, number)

    def kill(self) -> None:
        self.send(signal.SIGKILL)

    def reap(self) -> None:
        while self.processes:
            process = self.processes.pop()  # first: after its end its number may be reused
            process.wait()
            process.stdout.close()


class Watch:
    """A watch over the output and the ends of the processes of a start."""

    def __init__(self, woken: socket.socket) -> None:
        self.codes: dict[int, int] = {}  # process -> exit code, in the order in which they ended
        self._selector = selectors.DefaultSelector()
        self._woken = woken
        self._selector.register(woken, selectors.EVENT_READ)
        self._processes: list[subprocess.Popen] = []
        self._parts: list[bytes] = []  # the incomplete line of each process
        self._descriptors: list[int] = []
        self._heard = True  # whether this program's output is read

    def __enter__(self) -> Watch:
        return self

    def __exit__(self, *_: object) -> None:
        for number in range(len(self._parts)):
            self._print(number, b"\n" if self._parts[number] else b"")
        self._selector.close()
        for descriptor in self._descriptors:
            os.close(descriptor)

    @property
    def reading(self) -> bool:
        """Returns whether any process may still write."""
        return len(self._selector.get_map()) > 1

    def add(self, process: subprocess.Popen) -> None:
        number = len(self._processes)
        self._processes.append(process)
        self._parts.append(b"")
        self._selector.register(process.stdout, selectors.EVENT_READ, number)
        try:
            self._descriptors.append(os.pidfd_open(process.pid))
        except (AttributeError, OSError):  # not Linux, or an old version
            return
        # Linux queues these descriptors as their processes end: the events are in the order of time.
        self._selector.register(self._descriptors[-1], selectors.EVENT_READ, number)

    def step(self, seconds: float | None) -> bool:
        """Waits for output or the end of a process and handles it; returns False if nothing came in that time."""
        polled = len(self._descriptors) < len(self._processes)
        ready = self._selector.select(min(POLL_SECONDS, seconds or POLL_SECONDS) if polled else seconds)
        for key, _ in ready:
            if key.fileobj is self._woken:
                self._woken.recv(1 << 10)
            elif key.fd in self._descriptors:
                self._selector.unregister(key.fileobj)
                self._end(key.data)
            elif chunk := os.read(key.fd, 1 << 16):
                self._print(key.data, chunk)
            else:
                self._selector.unregister(key.fileobj)
        for number in range(len(self._processes) if polled else 0):
            self._end(number)
        return bool(ready)

    def _end(self, number: int) -> None:
        if number not in self.codes and (code := exit_code(self._processes[number])) is not None:
            self.codes[number] = code

    def _print(self, number: int, text: bytes) -> None:
        """Prints the complete lines, each after the number of its process."""
        *lines, part = (self._parts[number] + text).split(b"\n")
        if len(part) > LONGEST_LINE:
            lines, part = [*lines, part], b""
        self._parts[number] = part
        rest = b"".join(b"[%d] %b\n" % (number, line) for line in lines)
        while rest and self._heard:
            try:
                rest = rest[os.write(sys.stdout.fileno(), rest) :]
            except OSError as error:
                self._heard = False
                say(f"the output cannot be written ({error.strerror}); the processes continue without it")


def run(group: Group, command: list[str], options: argparse.Namespace) -> int:
    """Starts all processes once; returns the exit code after they and their children have ended.

    Raises:
        OSError: the command cannot be started.
    """
    port = options.port or free_port()
    environments = [
        os.environ | settings(number, options.processes, options.devices, port) for number in range(options.processes)
    ]
    with Watch(group.woken) as watch:
        try:
            group.start(command, environments, watch.add)
            until = killed = None
            while len(watch.codes) < len(group.processes):
                watch.step(None if until is None or killed else max(0.0, until - time.monotonic()))
                if until is None and any(code not in (0, STOPPED) for code in watch.codes.values()):
                    until = time.monotonic() + options.grace
                if until is not None and time.monotonic() >= until and not killed:
                    group.kill()
                    killed = True
            # Children may still hold the output: after a stop they have time to save, too.
            until = time.monotonic() + (options.grace if group.signalled is not None else 0)
            while watch.reading and (left := until - time.monotonic()) > 0:
                watch.step(left)
        finally:
            group.kill()
            until = time.monotonic() + LAST_SECONDS
            while watch.reading and watch.step(0.0) and time.monotonic() < until:
                pass
            group.reap()
    codes = list(watch.codes.values())
    if group.signalled is not None and set(codes) != {0}:
        return 128 + group.signalled
    return next((code for code in codes if code not in (0, STOPPED)), max(codes))


def exit_code(process: subprocess.Popen) -> int | None:
    """Returns the exit code (128 plus the signal that ended it), None while it runs; avoids reaping if it can."""
    if hasattr(os, "waitid"):
        end = os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT)
        code = None if end is None else end.si_status if end.si_code == os.CLD_EXITED else -end.si_status
    else:  # macOS before Python 3.13
        code = process.poll()
    return 128 - code if code is not None and code < 0 else code


def say(text: str) -> None:
    with suppress(OSError):
        print(f"local: {text}", file=sys.stderr, flush=True)


def free_port() -> int:
    """Returns a port below those of outgoing connections, so that none takes it before the coordinator."""
    for port in random.SystemRandom().sample(range(20_000, 32_000), 1_000):
        with socket.socket() as found, suppress(OSError):
            found.bind(("127.0.0.1", port))
            return port
    raise OSError(errno.EADDRINUSE, "none of 1,000 ports is free")


if __name__ == "__main__":
    sys.exit(main())
