"""Processes that leave nothing behind: starting them under a guard, knowing them again, ending them."""

from __future__ import annotations

import contextlib
import json
import os
import random
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from eoframework import clock
from eoframework.dev import guard
from eoframework.errors import ConfigurationError, Unreachable

_FALLBACK_EPHEMERAL_START = 32768
_HAS_PROC = Path("/proc/self/stat").exists()


class CalledOff(Unreachable):
    """A start was given up because the other service could not start, or the user stopped it."""


@dataclass(frozen=True, kw_only=True)
class Identity:
    """A process, told apart from a later one with the same pid by its start time."""

    pid: int
    started: str

    def alive(self) -> bool:
        """Whether this very process still runs; a zombie that nobody reaped counts as dead."""
        return start_time(self.pid) == self.started


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What to start: command (absolute program), log file for its output, user, signal and seconds for its end."""

    command: Sequence[str]
    log: Path | None = None
    uid: int | None = None
    gid: int | None = None
    directory: Path | None = None
    environment: Mapping[str, str] = field(default_factory=dict)
    stop_signal: signal.Signals = signal.SIGTERM
    grace: float = 5.0
    foreground: bool = False
    """Stay in the caller's session with its terminal; False: out of reach of its Ctrl-C."""

    def as_json(self) -> str:
        """The plan as the guard reads it."""
        return json.dumps(
            {
                "command": [str(part) for part in self.command],
                "log": str(self.log) if self.log else None,
                "uid": self.uid,
                "gid": self.gid,
                "directory": str(self.directory) if self.directory else None,
                "environment": dict(self.environment),
                "stop_signal": int(self.stop_signal),
                "grace": self.grace,
            }
        )


class Guarded:
    """A running program and its guard. Dropping this object, or the death of this process, ends the program."""

    def __init__(self, process: subprocess.Popen[bytes], control: int, identity: Identity) -> None:
        self.identity = identity
        self._process = process
        self._control = control

    def exit_code(self) -> int | None:
        """The program's exit code (128 + signal when it was killed), None while it runs."""
        return self._process.poll()

    def wait(self, timeout: float | None = None) -> int:
        """Wait for the end of the program and its guard; returns the exit code. Raises TimeoutError."""
        try:
            return self._process.wait(timeout)
        except subprocess.TimeoutExpired as error:
            raise TimeoutError(f"process {self.identity.pid} still runs after {timeout} s") from error

    def keep(self) -> None:
        """Let the program live on without this process; its guard leaves."""
        os.write(self._control, guard.KEEP)
        self._process.wait()
        self._close()

    def end(self) -> None:
        """End the program by its stop signal, after its grace by SIGKILL, and wait for it."""
        self._close()
        self._process.wait()

    def _close(self) -> None:
        control, self._control = self._control, -1
        if control >= 0:
            os.close(control)

    def __del__(self) -> None:
        # A KeyboardInterrupt between the start and the caller's assignment drops us: then the pipe must close too.
        with contextlib.suppress(OSError):
            self._close()


def spawn(plan: Plan) -> Guarded:
    """Start a program under a guard, so that it ends with this process however this process ends.

    On a crash: the guard sees the closed pipe, or its new parent within 0.5 s, and ends the program.
    """
    control_reader, control_writer = os.pipe()
    report_reader, report_writer = os.pipe()
    try:
        process = subprocess.Popen(
            # -I -S: no site-packages and no user code in a process that must not fail, 20 ms instead of 60.
            [sys.executable, "-I", "-S", guard.__file__, str(control_reader), str(report_writer)],
            pass_fds=(control_reader, report_writer),
            stdin=None if plan.foreground else subprocess.DEVNULL,
            stdout=None if plan.foreground else subprocess.DEVNULL,
            stderr=None if plan.foreground else subprocess.DEVNULL,
            start_new_session=not plan.foreground,
        )
    except BaseException:
        os.close(control_writer)
        os.close(report_reader)
        raise
    finally:
        os.close(control_reader)
        os.close(report_writer)
    try:
        with os.fdopen(report_reader, "rb") as report:
            os.write(control_writer, plan.as_json().encode() + b"\n")
            pid = int(report.readline() or b"0")
    except BaseException:
        os.close(control_writer)
        raise
    return Guarded(process, control_writer, Identity(pid=pid, started=start_time(pid)))


def run(plan: Plan) -> int:
    """Run a program to its end under a guard and return its exit code; an interrupt ends it too."""
    guarded = spawn(plan)
    try:
        return guarded.wait()
    finally:
        guarded.end()


def start_time(pid: int) -> str:
    """When the process started, as the system tells it; "" when it is gone or a zombie."""
    if _HAS_PROC:
        try:
            fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        except OSError:
            return ""
        return "" if fields[0] in "ZX" else fields[19]
    answer = subprocess.run(["ps", "-o", "stat=,lstart=", "-p", str(pid)], capture_output=True, text=True, check=False)
    state, _, started = answer.stdout.strip().partition(" ")
    return "" if not state or state.startswith("Z") else started.strip()


def send(identity: Identity, number: signal.Signals) -> bool:
    """Signal this very process; False when it is gone (its pid may belong to somebody else by now)."""
    if not identity.alive():
        return False
    try:
        os.kill(identity.pid, number)
    except ProcessLookupError:
        return False
    return True


def end(identity: Identity, *, stop_signal: signal.Signals, grace: float) -> None:
    """End a process that need not be our child: signal, wait up to `grace` seconds, SIGKILL, wait."""
    if not send(identity, stop_signal):
        return
    send(identity, signal.SIGCONT)
    if not wait_until(lambda: not identity.alive(), grace):
        send(identity, signal.SIGKILL)
        if not wait_until(lambda: not identity.alive(), 10):
            raise Unreachable(
                f"Process {identity.pid} does not end, not even by SIGKILL.",
                remedy="It hangs in the kernel (disk or network file system); look there.",
            )


def wait_until(condition: Callable[[], bool], seconds: float) -> bool:
    """Poll a condition every 20 ms for at most `seconds`; True as soon as it holds."""
    deadline = clock.monotonic() + seconds
    while not condition():
        if clock.monotonic() > deadline:
            return False
        clock.sleep(0.02)
    return True


def answers(port: int, *, timeout: float = 1.0) -> bool:
    """Whether something accepts connections on this loopback port."""
    try:
        with socket.create_connection(("127.0.0.1", port), timeout):
            return True
    except OSError:
        return False


def port_is_free(port: int) -> bool:
    """Whether a server could listen on this loopback port now."""
    with socket.socket() as probe:
        # As servers do: a connection of the previous owner that lingers in TIME_WAIT must not count as taken.
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return False
    return True


def free_port(*, avoid: Sequence[int] = ()) -> int:
    """A free loopback port below the system's ephemeral range.

    Never port 0's choice: a server restarts on its port, and while it is down any outgoing connection on this machine
    could be given that very port; a client that keeps trying it even connects to itself.
    """
    top = _ephemeral_start()
    for _ in range(200):
        port = random.randint(max(1024, top - 16_000), top - 1)
        if port not in avoid and port_is_free(port):
            return port
    raise ConfigurationError(
        f"No free port found below {top} on 127.0.0.1.", remedy="Stop some servers, or name ports with --kafka-port."
    )


def _ephemeral_start() -> int:
    try:
        return int(Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split()[0])
    except (OSError, ValueError):
        return _FALLBACK_EPHEMERAL_START


def choose_port(
    *, wanted: int | None, remembered: int | None, option: str, what: str, avoid: Sequence[int] = ()
) -> int:
    """The pinned port or an error naming it; else the one of last time while it is free; else a free one."""
    if wanted is not None:
        if not port_is_free(wanted):
            raise ConfigurationError(
                f"Port {wanted} for {what} is in use by another program.",
                remedy=f"Stop that program, or choose another port with {option} (without it a free one is taken).",
            )
        return wanted
    if remembered is not None and port_is_free(remembered):
        return remembered
    return free_port(avoid=avoid)
