"""The guard: a tiny process that starts one program and ends it when the process that asked for it is gone.

Run as a script by `processes.spawn`, in an interpreter without site-packages (20 ms, 8 MB); imports only the standard
library. It gets a control pipe whose other end only the asking process holds, and a report pipe for the program's pid.
The program is ended when the control pipe closes before the word `keep` came, or when the guard's parent is gone; with
`keep` the guard leaves and the program lives on by itself.

Why a process of its own, and not `PR_SET_PDEATHSIG`: that fires when the parent *thread* ends, is cleared by setuid
(PostgreSQL under its own user), and exists on Linux only. Why the pipe *and* the parent's pid: a process that the asker
forked and that outlives it keeps the pipe open. What the guard cannot do: outlive its own SIGKILL.
"""

from __future__ import annotations

import json
import os
import select
import signal
import sys
from typing import Any, NoReturn

KEEP = b"keep"


def main(control: int, report: int, plan: dict[str, Any]) -> NoReturn:
    """Start the program of `plan`, watch both it and the asker, and leave with the program's exit code."""
    asker = os.getppid()
    for descriptor in (control, report):
        os.set_inheritable(descriptor, False)
    wake_reader = _wake_on_child()
    for interrupt in (signal.SIGINT, signal.SIGQUIT, signal.SIGTSTP, signal.SIGHUP):
        # Ctrl-C goes to the whole foreground group: the program decides what it means, the guard must outlive it.
        signal.signal(interrupt, signal.SIG_IGN)
    pid = os.fork()
    if pid == 0:
        _become(plan)
    os.write(report, b"%d\n" % pid)
    os.close(report)
    while True:
        _leave_if_ended(pid)
        ready, _, _ = select.select([control, wake_reader], [], [], 0.5)
        if wake_reader in ready:
            os.read(wake_reader, 4096)
        if control in ready:
            if os.read(control, 64) == KEEP:
                os._exit(0)
            _end(pid, plan, wake_reader)
        if os.getppid() != asker:
            _end(pid, plan, wake_reader)


def _wake_on_child() -> int:
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
    # Without a Python handler SIGCHLD is not caught at all and select would sleep on.
    signal.signal(signal.SIGCHLD, lambda _number, _frame: None)
    return reader


def _become(plan: dict[str, Any]) -> NoReturn:
    try:
        signal.set_wakeup_fd(-1)
        for number in (signal.SIGCHLD, signal.SIGINT, signal.SIGQUIT, signal.SIGTSTP, signal.SIGHUP):
            signal.signal(number, signal.SIG_DFL)
        if plan.get("log"):
            log = os.open(plan["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
            os.dup2(log, 1)
            os.dup2(log, 2)
        if plan.get("uid") is not None:
            os.setgroups([])
            os.setgid(plan["gid"])
            os.setuid(plan["uid"])
        if plan.get("directory"):
            os.chdir(plan["directory"])
        for name, value in plan.get("environment", {}).items():
            # putenv + execv: the C environment is what execv hands on; nothing else in this process reads it.
            os.putenv(name, value)
        os.execv(plan["command"][0], plan["command"])
    except OSError as error:
        os.write(2, f"ERROR cannot start {plan['command'][0]}: {error}\n".encode())
    os._exit(127)


def _leave_if_ended(pid: int) -> None:
    ended, status = os.waitpid(pid, os.WNOHANG)
    if ended:
        code = os.waitstatus_to_exitcode(status)
        os._exit(code if code >= 0 else 128 - code)


def _end(pid: int, plan: dict[str, Any], wake_reader: int) -> NoReturn:
    # The child is not reaped yet, so its pid cannot belong to anybody else.
    os.kill(pid, plan.get("stop_signal", signal.SIGTERM))
    os.kill(pid, signal.SIGCONT)
    for _ in range(int(plan.get("grace", 5.0) * 10)):
        _leave_if_ended(pid)
        if select.select([wake_reader], [], [], 0.1)[0]:
            os.read(wake_reader, 4096)
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    os._exit(128 + signal.SIGKILL)


def _read_plan(control: int) -> dict[str, Any]:
    # Byte by byte: what follows the line (`keep`) belongs to the loop.
    line = b""
    while not line.endswith(b"\n"):
        byte = os.read(control, 1)
        if not byte:
            os._exit(0)
        line += byte
    plan: dict[str, Any] = json.loads(line)
    return plan


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), _read_plan(int(sys.argv[1])))
