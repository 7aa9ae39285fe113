"""launch/local.py with commands that take no time: output, exit codes, restarts, signals."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from pathlib import Path

LOCAL = Path(__file__).parents[2] / "launch" / "local.py"


def local(*arguments: str, code: str = "", seconds: float = 50) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(LOCAL), *arguments, "--", sys.executable, "-c", code]
    return subprocess.run(command, capture_output=True, text=True, timeout=seconds)


def test_each_process_is_told_its_number_and_its_lines_bear_it(monkeypatch):
    monkeypatch.setenv("XLA_FLAGS", "--xla_force_host_platform_device_count=8 --xla_dump_to=kept")
    code = "import os; e = os.environ; print(e['JAX_PROCESS_ID'], e['JAX_NUM_PROCESSES'], e['XLA_FLAGS'])"
    done = local("--processes", "3", "--devices", "2", code=code)
    flags = "--xla_force_host_platform_device_count=2 --xla_dump_to=kept"
    assert done.returncode == 0
    assert sorted(done.stdout.splitlines()) == [f"[{i}] {i} 3 {flags}" for i in range(3)]


def test_a_dry_run_prints_the_commands():
    done = local("-n", "2", "--dry-run", code="import shutil; shutil.rmtree('/')")
    first, second = done.stdout.splitlines()
    assert "JAX_PROCESS_ID='0'" in first and "JAX_PROCESS_ID='1'" in second and "JAX_PLATFORMS='cpu'" in first


def test_when_one_fails_the_rest_is_ended_and_its_code_returned():
    code = "import os, sys, time; os.environ['JAX_PROCESS_ID'] == '1' and sys.exit(7); time.sleep(60)"
    began = time.monotonic()
    assert local("-n", "2", "--grace", "0.3", code=code).returncode == 7
    assert time.monotonic() - began < 30


def test_all_start_again_as_often_as_allowed(tmp_path):
    code = f"""
import os, pathlib, sys
starts = pathlib.Path({str(tmp_path)!r}) / os.environ["JAX_PROCESS_ID"]
starts.write_text(starts.read_text() + "x" if starts.exists() else "x")
sys.exit(5 if len(starts.read_text()) < 3 and os.environ["JAX_PROCESS_ID"] == "0" else 0)
"""
    done = local("-n", "2", "--restarts", "2", code=code)
    assert done.returncode == 0 and "restart 2 of 2" in done.stderr
    assert [(tmp_path / name).read_text() for name in "01"] == ["xxx", "xxx"]
    (tmp_path / "0").write_text("")
    assert local("-n", "2", "--restarts", "1", code=code).returncode == 5


def test_a_stop_that_was_asked_for_is_no_failure():
    assert local("-n", "2", "--restarts", "3", code="import sys; sys.exit(130)").returncode == 130


def test_signals_are_passed_on():
    code = """
import signal, sys, time
def stop(number, frame):
    print("told", flush=True)
    sys.exit(130)
signal.signal(signal.SIGTERM, stop)
print("ready", flush=True)
time.sleep(60)
"""
    command = [sys.executable, str(LOCAL), "-n", "2", "--", sys.executable, "-c", code]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as started:
        assert {started.stdout.readline(), started.stdout.readline()} == {"[0] ready\n", "[1] ready\n"}
        started.send_signal(signal.SIGTERM)
        assert sorted(started.stdout.read().splitlines()) == ["[0] told", "[1] told"]
    assert started.returncode == 130


def test_nothing_to_run_is_refused():
    done = subprocess.run([sys.executable, str(LOCAL), "-n", "2"], capture_output=True, text=True)
    assert done.returncode == 2 and "a command after --" in done.stderr
