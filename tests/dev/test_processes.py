"""The guard and the identity of processes, with `sleep` in the services' place."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from eoframework.dev import processes
from eoframework.dev.processes import Identity, Plan
from eoframework.errors import ConfigurationError
from tests.dev.conftest import ROOT

SLEEP = str(shutil.which("sleep"))

ASKER = """
import os, sys
from eoframework.dev import processes
from eoframework.dev.processes import Plan
guarded = processes.spawn(Plan(command=[{sleep!r}, "300"]))
{more}
print(guarded.identity.pid, guarded.identity.started, flush=True)
sys.stdin.read()
"""


def asker(more: str = "") -> tuple[subprocess.Popen[str], Identity]:
    """A process that has started a guarded program and waits."""
    source = textwrap.dedent(ASKER).format(sleep=SLEEP, more=more)
    process = subprocess.Popen(
        [sys.executable, "-c", source], cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    pid, started = process.stdout.readline().split()
    return process, Identity(pid=int(pid), started=started)


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_program_ends_with_its_asker(number: signal.Signals) -> None:
    process, program = asker()
    with process:
        assert program.alive()
        process.send_signal(number)
    assert processes.wait_until(lambda: not program.alive(), 10)


def test_program_ends_although_a_fork_holds_the_pipe() -> None:
    """Seen to fail with the guard's check of its parent's pid removed: a forked worker keeps the pipe open."""
    fork = "fork = os.fork()\nif fork == 0:\n    import signal\n    signal.pause()\nprint(fork, flush=True)"
    source = textwrap.dedent(ASKER).format(sleep=SLEEP, more=fork)
    process = subprocess.Popen(
        [sys.executable, "-c", source], cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    forked = int(process.stdout.readline())
    pid, started = process.stdout.readline().split()
    program = Identity(pid=int(pid), started=started)
    try:
        process.kill()
        assert processes.wait_until(lambda: not program.alive(), 10)
        assert processes.start_time(forked) != ""
    finally:
        os.kill(forked, signal.SIGKILL)
        processes.end(program, stop_signal=signal.SIGKILL, grace=5)
        process.communicate()


def test_kept_program_outlives_its_asker() -> None:
    process, program = asker("guarded.keep()")
    with process:
        process.kill()
    try:
        assert program.alive()
    finally:
        processes.end(program, stop_signal=signal.SIGTERM, grace=5)
    assert not program.alive()


def test_stubborn_program_is_killed_after_its_grace(tmp_path: Path) -> None:
    (log := tmp_path / "log").touch()
    command = [str(shutil.which("sh")), "-c", "trap '' TERM; echo ready; while :; do sleep 0.1; done"]
    guarded = processes.spawn(Plan(command=command, log=log, grace=0.3))
    assert processes.wait_until(lambda: "ready" in log.read_text(), 10)
    guarded.end()
    assert not guarded.identity.alive()
    assert guarded.exit_code() == 128 + signal.SIGKILL


def test_exit_code_and_environment_come_through(tmp_path: Path) -> None:
    log = tmp_path / "log"
    command = [str(shutil.which("sh")), "-c", "echo $EO_DATABASE_URL; exit 7"]
    assert processes.run(Plan(command=command, log=log, environment={"EO_DATABASE_URL": "secret"})) == 7
    assert log.read_text() == "secret\n"


def test_secrets_do_not_stand_in_the_process_list(tmp_path: Path) -> None:
    guarded = processes.spawn(Plan(command=[SLEEP, "300"], environment={"EO_DATABASE_URL": "canary-4711"}))
    try:
        listing = subprocess.run(["ps", "axww", "-o", "args"], capture_output=True, text=True, check=True).stdout
        assert "guard.py" in listing
        assert "canary-4711" not in listing
    finally:
        guarded.end()


def test_missing_program_is_told_in_the_log(tmp_path: Path) -> None:
    log = tmp_path / "log"
    assert processes.run(Plan(command=["/nonexistent/program"], log=log)) == 127
    assert "cannot start /nonexistent/program" in log.read_text()


def test_a_reused_pid_is_neither_taken_for_ours_nor_killed() -> None:
    """Seen to fail with `alive` comparing nothing but the pid."""
    with subprocess.Popen([SLEEP, "300"]) as stranger:
        ours = Identity(pid=stranger.pid, started="1")
        try:
            assert not ours.alive()
            processes.end(ours, stop_signal=signal.SIGKILL, grace=1)
            assert stranger.poll() is None
        finally:
            stranger.kill()


def test_free_ports_are_never_ephemeral_ones() -> None:
    lowest = int(Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split()[0])
    assert all(processes.free_port() < lowest for _ in range(20))


def test_pinned_port_in_use_is_named() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(ConfigurationError, match=f"Port {port} for Kafka is in use") as caught:
            processes.choose_port(wanted=port, remembered=None, option="--kafka-port", what="Kafka")
        assert "--kafka-port" in caught.value.remedy
        assert processes.choose_port(wanted=None, remembered=port, option="", what="Kafka") != port
