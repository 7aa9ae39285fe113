"""One process at a time writes a run folder, and the refusal names it."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from mllm_jax.errors import RunFolderError
from mllm_jax.training.operations import run_lock
from mllm_jax.training.operations.run_lock import MARK, held

HOLDER = """
import sys
from pathlib import Path
from mllm_jax.training.operations.run_lock import held
with held(Path(sys.argv[1])):
    print("held", flush=True)
    sys.stdin.read()
"""


@pytest.fixture
def holder(tmp_path):
    """Starts another process that holds the folder until its input ends."""
    command = [sys.executable, "-c", HOLDER, str(tmp_path)]
    paths = os.pathsep.join([str(Path(__file__).parents[3]), os.environ.get("PYTHONPATH", "")])
    started = subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=os.environ | {"PYTHONPATH": paths}
    )
    assert started.stdout.readline() == "held\n"
    yield started
    started.kill()
    started.wait()
    started.stdout.close()


def refused(folder: Path) -> str:
    with pytest.raises(RunFolderError) as refusal, held(folder):
        pass
    assert refusal.value.given and refusal.value.expected and refusal.value.todo
    return str(refusal.value)


def test_a_second_process_is_refused_at_once_by_host_and_process(tmp_path, holder):
    message = refused(tmp_path)
    assert f"process {holder.pid} on host {socket.gethostname()}" in message and "--run-dir" in message


@pytest.mark.parametrize("how", ["end", signal.SIGKILL])
def test_the_lock_ends_with_its_process(tmp_path, holder, how):
    if how == "end":
        holder.stdin.close()
    else:
        holder.send_signal(how)
    holder.wait(60)
    with held(tmp_path):
        assert json.loads((tmp_path / MARK).read_text())["process"] == os.getpid()
    with held(tmp_path):
        pass


def test_a_holder_that_is_about_to_end_is_waited_for(tmp_path, monkeypatch):
    """Checks a killed process, which may hold it a moment longer, and one of another host, as long as NFS has it."""
    file = os.open(tmp_path / MARK, os.O_RDWR | os.O_CREAT)
    waits = []
    monkeypatch.setattr(
        run_lock.time, "sleep", lambda seconds: (waits.append(seconds), fcntl.flock(file, fcntl.LOCK_UN))
    )
    for who in ({"host": socket.gethostname(), "process": 2**22 + 1}, {"host": "elsewhere", "process": 1}, {}):
        fcntl.flock(file, fcntl.LOCK_EX)
        os.ftruncate(file, 0)
        os.pwrite(file, json.dumps(who).encode() if who else b"[" * 4000, 0)
        with held(tmp_path):
            pass
    assert len(waits) == 3
    os.close(file)


def test_patience_ends(tmp_path, monkeypatch):
    file = os.open(tmp_path / MARK, os.O_RDWR | os.O_CREAT)
    fcntl.flock(file, fcntl.LOCK_EX)
    os.pwrite(file, json.dumps({"host": "elsewhere", "process": 7, "since": "noon"}).encode(), 0)
    monkeypatch.setattr(run_lock, "ELSEWHERE_SECONDS", 0.0)
    assert "process 7 on host elsewhere since noon" in refused(tmp_path)
    os.close(file)


def test_a_disk_without_locks_is_warned_of(tmp_path, monkeypatch):
    def none(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", none)
    with pytest.warns(UserWarning, match="no locks"), held(tmp_path):
        pass


@pytest.mark.parametrize("where", ["open", "ftruncate"])
@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EACCES, errno.EROFS])
def test_a_lock_that_cannot_be_written_is_refused_and_given_back(tmp_path, monkeypatch, where, number):
    """Checks a full disk, and another user's folder."""

    def fail(*_):
        raise OSError(number, os.strerror(number))

    with monkeypatch.context() as patch:
        patch.setattr(run_lock.os, where, fail)
        assert os.strerror(number) in refused(tmp_path)
    with held(tmp_path):
        pass


def test_a_training_or_evaluation_beside_another_is_refused(tmp_path, holder, monkeypatch):
    """Checks that `--fresh` removes nothing of a running one (ATTACK, F10)."""
    from test_run_folder import EXPERIMENT

    from mllm_jax.evaluation import run
    from mllm_jax.training.loop import train

    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "stages" / "0-a").mkdir(parents=True)
    for fresh in (False, True):
        with pytest.raises(RunFolderError, match=f"process {holder.pid}"):
            train(EXPERIMENT, tmp_path, fresh=fresh)
    monkeypatch.setattr(run, "_asked", lambda folder, tasks: ([], []))
    with pytest.raises(RunFolderError, match=f"process {holder.pid}"):
        run.evaluate_run(tmp_path)
    assert (tmp_path / "stages" / "0-a").is_dir() and (tmp_path / "config.json").read_text() == "{}"
