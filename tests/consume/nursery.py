"""Real `eo` processes in 20 ms instead of a second: forked from one that has imported everything and opened nothing.

One JSON document a line on stdin: {"arguments", "environment", "log"} forks a process and answers its pid,
{"wait": pid, "seconds": n} answers how it ended; one that has not by then is killed. When stdin ends, every process
ends.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
import traceback
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any

from eoframework import bootstrap, cli
from tests.processes import REPOSITORY

IMPORTED = bootstrap
"""Not used here: it is what makes a process slow to start."""

LONGEST = 120.0
"""Seconds a process is waited for; below the tests' own limit, or a hanging process would be a test that hangs."""


class Nursery:
    """The parent of the forked processes; at the end of the block all of them are gone."""

    def __enter__(self) -> Nursery:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.consume.nursery"],
            cwd=REPOSITORY,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait(30)

    def spawn(self, *arguments: str, environment: dict[str, str], log: Path, **more: Path) -> Forked:
        """A process that runs `eo` with these arguments; `more`: its `stdin`, `stdout` and working `directory`."""
        log.touch()  # the child opens it a moment later, and its output may be asked for before
        question = {"arguments": arguments, "environment": environment, "log": str(log)}
        return Forked(self, self.ask(question | {name: str(path) for name, path in more.items()}), log)

    def ask(self, question: dict[str, Any]) -> int:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        print(json.dumps(question), file=self._process.stdin, flush=True)
        return int(self._process.stdout.readline())


class Forked:
    """One `eo` process."""

    def __init__(self, nursery: Nursery, pid: int, log: Path) -> None:
        self.pid = pid
        self.log = log
        self._nursery = nursery

    def signal(self, number: signal.Signals) -> None:
        os.kill(self.pid, number)

    def wait(self, seconds: float = LONGEST) -> int:
        """How it ended: the exit code, or minus the signal that killed it; -9 too when it had to be killed for it."""
        return self._nursery.ask({"wait": self.pid, "seconds": seconds})

    def output(self) -> str:
        return self.log.read_text(errors="replace")[-6000:]


def main() -> None:
    children: set[int] = set()
    for line in sys.stdin:
        question = json.loads(line)
        if "wait" in question:
            children.discard(question["wait"])
            print(_wait(question["wait"], question["seconds"]), flush=True)
            continue
        pid = os.fork()
        if pid == 0:
            _live(question)
        children.add(pid)
        print(pid, flush=True)
    for pid in children:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)


def _wait(pid: int, seconds: float) -> int:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        ended, status = os.waitpid(pid, os.WNOHANG)
        if ended:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.005)
    os.kill(pid, signal.SIGKILL)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def _live(question: dict[str, Any]) -> None:
    append = os.O_WRONLY | os.O_CREAT | os.O_APPEND
    os.dup2(os.open(question.get("stdin", os.devnull), os.O_RDONLY), 0)
    os.dup2(os.open(question.get("stdout", question["log"]), append), 1)
    os.dup2(os.open(question["log"], append), 2)
    os.chdir(question.get("directory", REPOSITORY))
    # Where `python -m` looks first: the directory it was started in.
    sys.path[0] = os.getcwd()
    os.environ.update(question["environment"])
    code = 1
    try:
        code = cli.invoke(question["arguments"])
    except BaseException:  # noqa: BLE001 - nothing may come back into the parent's loop
        traceback.print_exc()
    sys.stderr.flush()
    os._exit(code)


if __name__ == "__main__":
    main()
