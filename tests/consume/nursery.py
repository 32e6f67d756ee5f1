"""Real `eo` processes in 20 ms instead of a second: forked from one that has imported everything and opened nothing.

One JSON document a line on stdin: {"arguments", "environment", "log"} forks a process and answers its pid,
{"wait": pid} answers how it ended. When stdin ends, every process ends.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import traceback
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any

from eoframework import bootstrap, cli
from tests.processes import REPOSITORY

IMPORTED = bootstrap
"""Not used here: it is what makes a process slow to start."""


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

    def spawn(self, *arguments: str, environment: dict[str, str], log: Path) -> Forked:
        """A process that runs `eo` with these arguments."""
        log.touch()  # the child opens it a moment later, and its output may be asked for before
        return Forked(self, self.ask({"arguments": arguments, "environment": environment, "log": str(log)}), log)

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

    def wait(self) -> int:
        """How it ended: the exit code, or minus the signal that killed it."""
        return self._nursery.ask({"wait": self.pid})

    def output(self) -> str:
        return self.log.read_text(errors="replace")[-6000:]


def main() -> None:
    children: set[int] = set()
    for line in sys.stdin:
        question = json.loads(line)
        if "wait" in question:
            status = os.waitpid(question["wait"], 0)[1]
            children.discard(question["wait"])
            print(os.waitstatus_to_exitcode(status), flush=True)
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


def _live(question: dict[str, Any]) -> None:
    log = os.open(question["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    null = os.open(os.devnull, os.O_RDONLY)
    for source, target in ((null, 0), (log, 1), (log, 2)):
        os.dup2(source, target)
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
