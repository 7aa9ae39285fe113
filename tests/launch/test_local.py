"""launch/local.py with commands that take no time: output, exit codes, restarts, signals."""

from __future__ import annotations

import os
import select
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from signals import reset_handlers

LOCAL = Path(__file__).parents[2] / "launch" / "local.py"
READY = "import os, signal, sys; print('ready', os.getpid(), flush=True); "


def local(*arguments: str, code: str = "", seconds: float = 50) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(LOCAL), *arguments, "--", sys.executable, "-c", code]
    return subprocess.run(command, capture_output=True, text=True, timeout=seconds)


def launched(*arguments: str, code: str, **how) -> subprocess.Popen[str]:
    command = [sys.executable, str(LOCAL), "-n", "2", *arguments, "--", sys.executable, "-c", code]
    pipes = dict.fromkeys(("stdout", "stderr"), subprocess.PIPE)
    return subprocess.Popen(command, text=True, preexec_fn=reset_handlers, **pipes, **how)


def ready(launcher: subprocess.Popen[str]) -> list[int]:
    """Waits until both processes report that they have started; returns their process ids."""
    lines = sorted(launcher.stdout.readline().split() for _ in range(2))
    assert [line[:2] for line in lines] == [["[0]", "ready"], ["[1]", "ready"]]
    return [int(line[2]) for line in lines]


def test_each_process_gets_its_number_and_its_lines_have_it(monkeypatch):
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
    code = "import os, signal, sys; os.environ['JAX_PROCESS_ID'] == '1' and sys.exit(7); signal.pause()"
    assert local("-n", "2", "--grace", "0.3", code=code).returncode == 7


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
    # Waits for the signal instead of handling it: a handler may run in the middle of the previous line.
    code = f"""
import signal, sys
signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])
{READY}
signal.sigwait([signal.SIGTERM])
print("got it", flush=True)
sys.exit(130)
"""
    with launched(code=code) as launcher:
        ready(launcher)
        launcher.send_signal(signal.SIGTERM)
        printed, errors = launcher.communicate(timeout=50)
    assert sorted(printed.splitlines()) == ["[0] got it", "[1] got it"] and not errors
    assert launcher.returncode == 128 + signal.SIGTERM


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_nothing_starts_again_after_a_stop(number):
    code = f"import signal; signal.signal(signal.SIGINT, signal.SIG_DFL); {READY} signal.pause()"
    with launched("--restarts", "2", code=code) as launcher:
        ready(launcher)
        launcher.send_signal(number)
        assert launcher.communicate(timeout=50) == ("", "")
    assert launcher.returncode == 128 + number


def test_the_second_signal_ends_processes_that_ignore_it():
    code = """
import os, signal
heard, said = os.pipe()
signal.set_wakeup_fd(said, warn_on_full_buffer=False) if os.set_blocking(said, False) is None else None
signal.signal(signal.SIGTERM, lambda *_: None)
print("ready", os.getpid(), flush=True)
os.read(heard, 1)
print("got it", flush=True)
while True:
    signal.pause()
"""
    with launched("--grace", "1000", code=code) as launcher:
        ready(launcher)
        launcher.send_signal(signal.SIGTERM)
        assert sorted(launcher.stdout.readline() for _ in range(2)) == ["[0] got it\n", "[1] got it\n"]
        launcher.send_signal(signal.SIGTERM)
        assert launcher.wait(50) == 128 + signal.SIGTERM


def test_a_signal_that_nohup_has_ignored_stays_ignored():
    code = f"{READY} signal.pause()"
    command = ["sh", "-c", 'trap "" HUP; exec "$@"', "sh", sys.executable, str(LOCAL), "--", sys.executable, "-c", code]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as launcher:
        for process in ready(launcher):
            os.kill(process, signal.SIGHUP)
        launcher.send_signal(signal.SIGHUP)  # it comes first, as the lower number of the two
        launcher.send_signal(signal.SIGTERM)
        assert launcher.wait(50) == 128 + signal.SIGTERM


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_processes_start_with_the_handlers_and_the_mask_of_any_other():
    command = [sys.executable, str(LOCAL), "-n", "1", "--", "grep", "-E", "SigBlk|SigIgn|SigCgt", "/proc/self/status"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=50, preexec_fn=reset_handlers)
    masks = [int(line.split()[-1], 16) for line in done.stdout.splitlines()]
    bits = sum(1 << number - 1 for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGPIPE))
    assert len(masks) == 3 and not any(mask & bits for mask in masks)


@pytest.mark.skipif(not hasattr(os, "pidfd_open"), reason="only Linux says in which order processes end")
def test_the_code_is_that_of_the_first_failure_in_time():
    with launched("--grace", "0.1", code=f"{READY} signal.pause()") as launcher:
        first, second = ready(launcher)
        os.kill(launcher.pid, signal.SIGSTOP)  # so that it sees both ends at once
        for process, number in ((second, signal.SIGKILL), (first, signal.SIGTERM)):
            descriptor = os.pidfd_open(process)
            os.kill(process, number)
            assert select.select([descriptor], [], [], 50)[0]
            os.close(descriptor)
        os.kill(launcher.pid, signal.SIGCONT)
        assert launcher.wait(50) == 128 + signal.SIGKILL


def test_what_a_process_leaves_running_is_ended():
    command = [sys.executable, str(LOCAL), "-n", "2", "--", "sh", "-c", "sleep 3600 & echo $!; exit 0"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=50)
    assert done.returncode == 0
    for line in done.stdout.splitlines():
        left = Path(f"/proc/{line.split()[1]}/cmdline")
        assert not left.exists() or "sleep" not in left.read_text()


def test_the_run_goes_on_when_nobody_reads_what_it_prints(tmp_path):
    code = f"{READY} sys.stdin.readline(); print('x' * 1_000_000); open(sys.argv[1] + str(os.getpid()), 'w')"
    command = [sys.executable, str(LOCAL), "--", sys.executable, "-c", code, str(tmp_path / "done")]
    pipes = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
    with subprocess.Popen(command, text=True, **pipes) as launcher:
        ready(launcher)
        launcher.stdout.close()
        launcher.stdin.close()
        assert launcher.wait(50) == 0
        assert launcher.stderr.read().count("the output cannot be written") == 1
    assert len(list(tmp_path.iterdir())) == 2


def test_a_command_that_cannot_be_started_is_one_sentence(tmp_path):
    (tmp_path / "plain").write_text("no program")
    for name, code, reason in (("nosuch", 127, "no such command"), (str(tmp_path / "plain"), 126, "Permission denied")):
        command = [sys.executable, str(LOCAL), "-n", "2", "--restarts", "2", "--", name]
        done = subprocess.run(command, capture_output=True, text=True, timeout=50)
        assert (done.returncode, done.stdout) == (code, "")
        assert done.stderr == f"local: {name} cannot be started: {reason}\n"


@pytest.mark.skipif(sys.platform != "linux", reason="finds processes in /proc")
def test_signals_in_the_first_moments_leave_no_process():
    command = [sys.executable, str(Path(__file__).with_name("signals.py")), "--signals", "16", "--seed", "17"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0 and "| orphans 0 | not ended 0 | wrong codes 0 |" in done.stdout, done.stdout


def test_nothing_to_run_is_refused():
    done = subprocess.run([sys.executable, str(LOCAL), "-n", "2"], capture_output=True, text=True)
    assert done.returncode == 2 and "a command after --" in done.stderr
